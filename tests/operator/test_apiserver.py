"""What is read out of an API server's refusals."""

import json

import pytest
from octavo_operator.apiserver import read_error

REFUSED = {
    "kind": "Status",
    "apiVersion": "v1",
    "status": "Failure",
    "message": 'events "e" is forbidden: unable to create new content in namespace n because it is being terminated',
    "reason": "Forbidden",
    "details": {
        "name": "e",
        "kind": "events",
        "causes": [{"reason": "NamespaceTerminating", "message": "namespace n is being terminated"}],
    },
    "code": 403,
}


def test_a_namespace_that_is_being_deleted_is_told_from_missing_rights() -> None:
    error = read_error(403, json.dumps(REFUSED))
    assert (error.status, str(error), error.ends_with_namespace) == (403, REFUSED["message"], True)
    assert not read_error(403, json.dumps({**REFUSED, "details": {"name": "e", "kind": "events"}})).ends_with_namespace


@pytest.mark.parametrize("text", ["upstream connect error\n", "[]", '"no"', "", '{"details": []}'])
def test_what_is_no_status_object_is_told_as_it_came(text: str) -> None:
    error = read_error(502, text)
    assert (str(error), error.ends_with_namespace) == (text.strip(), False)
