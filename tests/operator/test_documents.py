"""Files with manifests: what is read from them, and what is said about those that cannot be read."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from octavo_operator.documents import NodeFile, node_manifests, read_documents
from octavo_operator.errors import ManifestError
from octavo_operator.objectstore import ObjectStore
from operator_samples import node_manifest


def write(path: Path, *manifests: object) -> Path:
    path.write_text(yaml.safe_dump_all(manifests))
    return path


def names(path: Path) -> list[str]:
    return [each["metadata"]["name"] for each in node_manifests(read_documents(path))]


def test_nodes_are_read_from_a_list_and_from_documents(tmp_path):
    one, two = node_manifest("one"), node_manifest("two")
    assert names(write(tmp_path / "list", {"kind": "List", "items": [one, two]})) == ["one", "two"]
    bare = {"kind": "NodeList", "items": [{key: value for key, value in one.items() if key != "kind"}]}
    assert names(write(tmp_path / "documents", bare, two)) == ["one", "two"]


BAD = {
    "another kind": ("kind: Pod", "a Pod is no Node"),
    "no kind": ("name: x", "a document without a kind is no Node"),
    "no mapping": ("- 1", "a list is no Node"),
    "a node without a name": ("{kind: Node, metadata: {}}", "the nodes cannot be read"),
    "an amount that is none": (
        "{kind: Node, metadata: {name: a}, status: {allocatable: {cpu: lots}}}", "the nodes cannot be read"
    ),
    "no YAML": ("a: [", "is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_list_of_nodes_is_refused_in_a_sentence(tmp_path, case):
    text, sentence = BAD[case]
    file = tmp_path / "nodes.yaml"
    file.write_text(text)
    with pytest.raises(ManifestError, match=sentence):
        NodeFile(file).list()


def test_a_file_that_went_away_is_an_error_in_a_sentence(tmp_path):
    with pytest.raises(ManifestError, match="cannot read"):
        NodeFile(tmp_path / "gone").list()


def test_an_edited_file_replaces_what_was_read_before(tmp_path):
    """Whatever resource versions the file has: it was written by hand, or by a command long ago."""
    file, store = tmp_path / "nodes.yaml", ObjectStore()
    source = NodeFile(file)

    def reread(*manifests):
        write(file, *manifests)
        return store.replace_nodes(*source.list())

    one, two = node_manifest("one"), node_manifest("two")
    one["metadata"]["resourceVersion"] = "900"
    assert reread(one, two)
    assert not reread(one, two)
    one["metadata"]["labels"]["zone"] = "b"
    assert reread(one, two)
    assert reread(one)
    assert [each.name for each in store.nodes()] == ["one"]
    assert store.nodes()[0].labels["zone"] == "b"


def test_an_operator_does_not_start_with_nodes_that_cannot_be_read(tmp_path):
    file = tmp_path / "nodes.yaml"
    file.write_text("kind: Pod")
    run = subprocess.run(
        [Path(sys.executable).with_name("octavo"), "operator", "--nodes", file, "--kubeconfig", tmp_path / "none"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.strip() == "octavo: a Pod is no Node"
