"""/v1/responses: OpenAI's newer one, as a translation to and from what chat completions use."""
