"""An OpenAI-compatible endpoint over a backend's fixed slots."""
