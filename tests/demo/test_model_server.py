"""The commands that start real servers; the servers themselves run in tests/serving and tests/data_generation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from demo import model_server

MODEL = Path("/models/m")


def test_server_command_speculates_with_the_heads_in_vllm_only(tmp_path):
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3}')
    command = model_server.server_command("vllm", MODEL, 1234, tmp_path)
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {"method": "medusa", "model": str(tmp_path), "num_speculative_tokens": 3}
    assert "--speculative-config" not in model_server.server_command("vllm", MODEL, 1234)
    command = model_server.server_command("transformers", MODEL, 1234)
    assert command[:3] == [Path(sys.executable).with_name("transformers"), "serve", MODEL]
    assert command[command.index("--port") + 1] == "1234"
