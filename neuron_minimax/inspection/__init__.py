"""Reports on what is in a checkpoint: precision, values, module lists, as text, JSON and a page."""
