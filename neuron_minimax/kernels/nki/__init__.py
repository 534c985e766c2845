"""The expert MLP in NKI."""
