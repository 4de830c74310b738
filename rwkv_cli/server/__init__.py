"""The server: OpenAI's interface over HTTP. It reads requests and writes what the engine's scheduler answers."""
