"""Chat templates: Jinja programs that come with a model and write a conversation the way it was trained to read it.

They are untrusted code, so they run in Jinja's immutable sandbox. What they may use beside Jinja itself is what Hugging
Face documents for chat templates: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls and
the `generation` tag.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo_engine.errors import InvalidRequestError, ModelSourceError


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Only the statements inside."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A compiled template. Raises ModelSourceError if it is not valid Jinja.

    special_tokens: what the template may name, such as bos_token and eos_token
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelSourceError(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        continue_final_message: end inside the last message, so that the model goes on with it
        variables:              what else the template reads, such as tools
        Raises InvalidRequestError with the template's own words if it refuses the conversation.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        mark = uuid.uuid4().hex
        if continue_final_message and messages:
            messages = [*messages[:-1], _marked(messages[-1], mark)]
        names = {**self._special_tokens, "tools": None, "documents": None, **variables}
        names |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            text: str = self._template.render(names)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            message = f"the model's chat template refuses this conversation: {error}"
            raise InvalidRequestError(message, param="messages") from None
        if not continue_final_message:
            return text
        before, found, _ = text.partition(mark)
        if not found:
            raise InvalidRequestError("the model's chat template leaves the last message out", param="messages")
        return before


def _marked(message: Mapping[str, Any], mark: str) -> Mapping[str, Any]:
    """A message whose text ends with the mark: what templates write behind it may hold the same words."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise InvalidRequestError("the last message has no text that could be continued", param="messages")
    return {**message, "content": content.rstrip() + mark}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
