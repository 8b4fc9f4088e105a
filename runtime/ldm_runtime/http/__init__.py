"""HTTP server: OpenAI's images API, health checks, metrics and a web page, without torch.

Needs the packages of the extra ``serve``: starlette, uvicorn and python-multipart.
"""
