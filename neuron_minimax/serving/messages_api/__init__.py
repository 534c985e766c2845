"""/v1/messages: Anthropic's protocol, as a translation to and from what chat completions use."""
