"""The server: a watcher and a model over HTTP, for OpenAI clients, dashboards and people.

Everything that arrives here is hostile until checked: `guard` sees a request first, `media`, `files` and `fetch` decide
what may be read, `hosts` what may be connected to. Nothing here reads the environment or sets up logging.
"""
