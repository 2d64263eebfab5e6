"""llama-cpp-python's server, which speaks OpenAI's interface, on this machine alone and with a bundle's settings."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, missing_extra

HOST = "127.0.0.1"


def server_settings(model: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What llama-cpp-python's server is told, from bundle.json's facts.

    Raises:
        BadInput: the bundle is not for llama.cpp.
    """
    if facts["runtime"] != "llamacpp":
        raise BadInput(
            f"its file runs on {facts['runtime']}, and the server is llama.cpp's",
            where=model.parent,
            remedy="fit with a GGUF quantisation (--quant Q4_0)",
        )
    settings = facts["settings"]
    told: dict[str, Any] = {
        "model": str(model),
        "model_alias": model.parent.name,
        "n_ctx": facts["n_ctx"],
        "n_threads": facts["threads"],
        "n_threads_batch": facts["threads"],
        "flash_attn": settings.get("flash_attn", "auto") is not False,
        "n_gpu_layers": settings.get("gpu_layers", 0),
        "verbose": False,
    }
    if "n_ubatch" in settings:
        told["n_ubatch"] = settings["n_ubatch"]
    if settings.get("cache_type") == "Q8_0":
        import llama_cpp

        told["type_k"] = told["type_v"] = llama_cpp.GGML_TYPE_Q8_0
    return told


def app_of(model: Path, facts: Mapping[str, Any]) -> Any:
    """The server's application, with the model loaded.

    The package lets every page in a browser call it; here none may, for a model on loopback is not for the web to use.

    Raises:
        BadInput: the server's packages are not installed, or the bundle is not for llama.cpp.
    """
    settings = server_settings(model, facts)
    try:
        from fastapi.middleware.cors import CORSMiddleware
        from fastapi.middleware.trustedhost import TrustedHostMiddleware
        from llama_cpp.server.app import create_app
        from llama_cpp.server.settings import ModelSettings, ServerSettings
    except ImportError as error:
        raise missing_extra(error.name or "fastapi", "serve") from error
    with _without("CONFIG_FILE"):  # which would take the place of everything here
        served = ServerSettings(host=HOST, api_key=None, root_path="", interrupt_requests=False)
        app = create_app(server_settings=served, model_settings=[ModelSettings(**settings)])
    app.user_middleware = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    # A page whose name is made to lead to this machine is of the same origin as the model, but not of its name.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return app


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """An environment variable put aside for a while."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def serve(model: Path, facts: Mapping[str, Any], port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted, at `HOST` and `port`, whose address `say` is told.

    Raises:
        BadInput: the port is taken, or as `app_of`.
    """
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise BadInput(
            f"cannot listen ({error.strerror})", where=f"{HOST}:{port}", remedy="choose another --port"
        ) from error
    with listening:
        app = app_of(model, facts)
        import uvicorn

        say(f"http://{HOST}:{port}/v1, until Ctrl-C")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
