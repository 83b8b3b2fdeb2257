"""`octavo serve` with a fake core and a byte tokenizer, as a process of its own: CORE [OPTIONS of octavo serve]."""

import sys

from engine.server.fake_tokenizer import ByteTokenizer
from octavo_engine.cli import main
from octavo_engine.server import lifecycle

if __name__ == "__main__":
    core = f"engine.server.fake_core:{sys.argv[1]}"
    run_server = lifecycle.run_server
    lifecycle.run_server = lambda config: run_server(config, core=core, load_tokenizer=lambda _: ByteTokenizer())
    main(["serve", "fake", *sys.argv[2:]])
