"""Which experts a model chooses: traces of its routing, statistics over them, plots, and placements
on ranks.
"""
