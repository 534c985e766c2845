"""Studies of a model: which experts fire, how it is built, how good it is."""
