"""The worked example of docs/choosing.md is what `octavo plan` prints."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from octavo_operator.plan_command import plan

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text()


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "llama.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    nodes = ROOT / "examples" / "nodes.yaml"
    result = CliRunner().invoke(plan, ["-f", str(file), "--nodes", str(nodes), "-o", "json"])
    assert result.exit_code == 0, result.output
    found = {each["nodeType"]: each for each in json.loads(result.stdout)["variants"]}
    return found["h100"], found["gh200-96gb"]


def cells(name):
    """The two numbers of the table's row that begins with this name."""
    return re.search(rf"^\| {re.escape(name)} \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE).groups()


ROWS = {
    "weights": lambda each: f"{each['memory']['weights']:,}",
    "activations": lambda each: f"{each['memory']['activations']:,}",
    "CUDA graphs": lambda each: f"{each['memory']['graphs']:,}",
    "runtime": lambda each: f"{each['memory']['runtime']:,}",
    "left for KV blocks of 2 MiB": lambda each: f"{each['kvBlocks']:,}",
    "tokens in the cache": lambda each: f"{each['kvBlocks'] * 16:,}",
    "90 % of the device": lambda each: f"{int(sum(each['memory'].values()) * 0.9):,}",
    "decode step, ms": lambda each: f"{each['predicted']['decodeMs']}",
    "tokens a second": lambda each: f"{each['predicted']['decodeTokensPerSecond']:,}",
    "first token of 1,024, ms": lambda each: f"{each['predicted']['ttftMs']}",
}


@pytest.mark.parametrize("name", ROWS)
def test_each_number_of_the_tables_is_that_of_the_plan(name, variants):
    assert cells(name) == tuple(ROWS[name](each) for each in variants)


def test_the_sentences_name_the_limits_that_follow(variants):
    for each, balance in zip(variants, (295, 247), strict=True):
        assert (each["maxNumSeqs"], each["maxNumBatchedTokens"], each["maxModelLen"]) == (512, 8704, 131072)
        assert f"equal at {balance}" in each["limitsWhy"]["maxNumSeqs"]
        assert "the prompts take 116 ms" in each["limitsWhy"]["maxNumBatchedTokens"]
    assert "balance 2 x 989 / (2 x 3.35) = 295 tokens" in PAGE
    assert "balance 247" in PAGE
