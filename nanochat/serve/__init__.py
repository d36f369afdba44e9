"""The web application: a page, a chat API and an OpenAI-compatible API over the engine."""
