"""What fits on an instance, and which settings cannot work, decided before anything is compiled; no
torch here.
"""
