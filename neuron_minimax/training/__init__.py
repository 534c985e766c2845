"""Training of small models of this architecture, the demo among them, and how right they answer."""
