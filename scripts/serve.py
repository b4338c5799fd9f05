"""Serve Stable Diffusion over HTTP: AUTOMATIC1111's and OpenAI's interfaces, one of our own, and a page.

python scripts/serve.py
python scripts/serve.py --ckpt v1-5-pruned-emaonly.safetensors --models ~/models --loras ~/loras
SD_SERVER_API_KEY=... python scripts/serve.py --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from importlib.util import find_spec

if not __package__:  # run as a file: see bootstrap.py
    import bootstrap

    __package__ = bootstrap.PACKAGE

from .common import cli, server_options, user_cache

NEEDED = {
    "fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}  # fmt: skip


def parser() -> cli.Parser:
    """The arguments: one for each setting of the server."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings",
        type=cli.file_path,
        metavar="FILE",
        help="JSON or TOML file of settings, named as the options; an option counts more than the variable "
        "SD_SERVER_<NAME> in the environment, and that more than the file",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="do not use the user's cache folder, which keeps converted weights and the choice of kernels",
    )
    server_options.add_server_arguments(parser)
    return parser


def serve(args: argparse.Namespace) -> int:
    """Read the settings, listen, load, serve until a signal comes."""
    folder = None if args.no_cache else user_cache.user_cache()
    settings = server_options.read_settings(args, os.environ, {} if folder is None else {"cache": folder})
    if missing := [name for module, name in NEEDED.items() if find_spec(module) is None]:
        raise ValueError(f'the server needs {", ".join(missing)}: pip install "sd-from-scratch[server]"')

    from sd.server.app import create_app
    from sd.server.logs import JsonLines

    from .common import serving

    log(JsonLines(settings.log_prompts))
    opened = serving.listen(settings.host, settings.port)
    try:
        user_cache.recall_kernels(args)
        server = serving.Server(create_app(settings), settings, serving.say_line)
        workers = server.engine.workers
        if any(worker.device.type == "cpu" for worker in workers) and not settings.low_memory:
            cli.keep_freed_memory()
        server.run_on(opened)
    finally:
        for each in opened:
            each.close()
    if server.failure:
        return cli.fail(server.failure)
    user_cache.keep_kernels(args)
    for loaded in (loaded for worker in workers for loaded in worker.models):
        loaded.model.save_cache(note=lambda text: warnings.warn(text, stacklevel=1))
    return 0


def log(formatter: logging.Formatter) -> None:
    """Write what the server and uvicorn log, and warnings, to the standard error stream."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    for name, level in (("sd.server", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    warnings.showwarning = lambda message, *_, **__: logging.getLogger("sd.server").warning(str(message))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(serve, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
