"""From messages to token ids: chat templates, and text that stays text.

A tokenizer finds its special tokens wherever their names stand, so that `<|im_end|>` in a question
or in an answer that is shown to the teacher would close its turn. Here the special tokens of a
prompt are those that the chat template writes; the same names in a message are spelled out.
"""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, TemplateError

from sodfast.errors import UsageError

Message = Mapping[str, str]  # "role", such as user, and "content"; nothing else of it is shown
Switches = Mapping[str, Any]  # variables of a chat template by name, such as enable_thinking
NO_SWITCHES: Switches = MappingProxyType({})

# What Python code raises that somebody else has written, as a chat template is.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_OPTIONS = {"add_generation_prompt": True, "enable_thinking": False}
# What `apply_chat_template` takes beside its own options and hands on to the template.
_HANDED_ON = {"tools", "documents", "kwargs"}
CPU_SECONDS = 5
WALL_SECONDS = 120  # of a machine that is busy otherwise
MEMORY_BYTES = 4 * 2**30


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], switches: Switches = NO_SWITCHES
) -> list[int]:
    """Token ids of a prompt: the chat template where there is one, otherwise the texts as they are,
    with an empty line between them. The template is given `switches`, and `enable_thinking=False`
    where they do not say otherwise.

    Text without the names of special tokens gives the ids of one call of the tokenizer on the whole
    prompt. Raises `UsageError` where the template refuses the messages, such as a system message,
    where a text is no Unicode or the prompt has no token, and where it cannot be told which special
    tokens are the template's own.
    """
    for message in messages:
        if not message["role"].isidentifier():  # templates write it beside their special tokens
            raise UsageError(f"a message's role must be a word, not {message['role'][:40]!r}")
    messages = [{key: message[key] for key in ("role", "content")} for message in messages]
    text = _render(tokenizer, messages, switches)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"a prompt holds half of a surrogate pair ({text[error.start]!r}), which is no Unicode "
            "text: take it out of the rows of task.*"
        ) from error
    ids = list(_tokenize(tokenizer, text).input_ids)
    roles = tuple(message["role"] for message in messages)
    special, expected = _specials(tokenizer, roles, json.dumps(dict(switches)))
    if [i for i in ids if i in special] != expected:
        ids = _spell_out(tokenizer, messages, switches, text, special)
    if not ids:
        raise UsageError(
            f"a {' and '.join(roles)} message comes out empty: the model's chat template or its "
            "tokenizer drops it: choose another model"
        )
    return ids


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by itself; the names of special tokens are spelled out."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def opens_thinking(tokenizer: Any, switches: Switches = NO_SWITCHES) -> bool:
    """Whether prompts end within a thought, so that an answer closes one that it has not opened."""
    text = _render(tokenizer, [{"role": "user", "content": "x"}], switches)
    return text.rstrip().endswith("<think>")


def require_prompts(tokenizer: Any, place: str, switches: Switches = NO_SWITCHES) -> None:
    """Raise `UsageError`, which begins with `place`, where a user's message gives no prompt, or
    where the chat template takes more than `CPU_SECONDS` or `MEMORY_BYTES` to render one."""
    if tokenizer.chat_template:
        _require_template_ends(tokenizer, place, switches)
    try:
        encode_messages(tokenizer, [{"role": "user", "content": "1"}], switches)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def require_switches(tokenizer: Any, place: str, switches: Switches) -> None:
    """Raise `UsageError`, which begins with `place`, where the chat template does not read one of
    the `switches`, one is not for the template to read, or `require_prompts` raises with them.

    A template reads what it names: no other trial tells a switch that is at its default from one
    that is not there.
    """
    if not switches:
        return
    if not tokenizer.chat_template:
        raise UsageError(f"{place}: the model has no chat template to read it: leave it out")
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    tokens = Environment().lex(tokenizer.get_chat_template())
    names = {value for _, kind, value in tokens if kind == "name"}
    for name in switches:
        if name in reserved - _HANDED_ON:
            raise UsageError(f"{place}: {name} is not for the template to read: leave it out")
        if name not in names:
            raise UsageError(
                f"{place}: the model's chat template does not know the switch {name!r}: leave it "
                "out, or name one that the template reads"
            )
    require_prompts(tokenizer, place, switches)


def _require_template_ends(tokenizer: Any, place: str, switches: Switches) -> None:
    """Raise `UsageError` where rendering a message takes too much time or memory.

    A template is a program. It is tried in a process of its own, since nothing else ends every
    program: a signal reaches the main thread alone, and neither a signal nor jinja's sandbox, which
    bounds a single range, ends `10 ** (10 ** 10)` or loops within loops. Prompts are rendered in
    this process afterwards: a template that loops for certain texts alone is not found.
    """
    conversations = []
    for text in ("1", "1 + 1 = ? " * 100):
        user, system = {"role": "user", "content": text}, {"role": "system", "content": text}
        conversations += [[user], [system, user]]
    change = "mend it, or choose another model"
    try:
        template = tokenizer.get_chat_template()
    except _TEMPLATE_ERRORS as error:  # several templates and none that is the default
        raise UsageError(f"{place} is no chat template ({error}): {change}") from error
    if not isinstance(template, str):
        raise UsageError(f"{place} is no text: {change}")
    task = {
        "options": {**tokenizer.special_tokens_map, **_OPTIONS, **switches},
        "conversations": conversations,
        "template": template,
        "cpu": CPU_SECONDS,
        "memory": MEMORY_BYTES,
    }
    try:
        # -P: a file of the working directory does not stand in for a library.
        tried = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{place} takes more than {WALL_SECONDS} s to render: {change}") from error
    if tried.returncode != 0:
        raise UsageError(
            f"{place} cannot be rendered within {CPU_SECONDS} s of computing, "
            f"{MEMORY_BYTES / 2**30:g} GiB of memory and a million letters: {change}"
        )


# Renders each conversation; what Python raises is no concern here, since the prompts themselves
# will raise it again. Limits are set after the imports, which take a second.
_TRIAL = """
import json, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template

task = json.load(sys.stdin)
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = int(used.ru_utime + used.ru_stime) + 1 + task["cpu"]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (task["memory"], task["memory"]))
for conversation in task["conversations"]:
    try:
        (text,), _ = render_jinja_template(
            conversations=[conversation], chat_template=task["template"], **task["options"]
        )
        if len(text) > 10**6:
            raise MemoryError
    except MemoryError:
        sys.exit(1)
    except Exception:
        pass
"""


def _render(tokenizer: Any, messages: Sequence[Message], switches: Switches) -> str:
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    options = {**_OPTIONS, **switches}
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except _TEMPLATE_ERRORS as error:
        roles = " and ".join(message["role"] for message in messages)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"the model's chat template refuses a {roles} message ({reason}): change the rows "
            "of task.* or choose another model"
        ) from error
    return text


def _tokenize(tokenizer: Any, text: str, **options: Any) -> Any:
    if tokenizer.chat_template:  # which writes the tokenizer's own tokens, such as a first one
        options["add_special_tokens"] = False
    return tokenizer(text, **options)


@lru_cache(maxsize=16)
def _specials(
    tokenizer: Any, roles: tuple[str, ...], switches: str
) -> tuple[frozenset[int], list[int]]:
    """The ids that no text may become, and those of them in a prompt whose texts hold none.
    `switches` are given as JSON, which can be hashed.

    The token for what is unknown is left out: any text may hold something unknown.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special.discard(tokenizer.unk_token_id)
    neutral = [{"role": role, "content": "x"} for role in roles]
    ids = _tokenize(tokenizer, _render(tokenizer, neutral, json.loads(switches))).input_ids
    return frozenset(special), [i for i in ids if i in special]


def _spell_out(
    tokenizer: Any,
    messages: Sequence[Message],
    switches: Switches,
    text: str,
    special: frozenset[int],
) -> list[int]:
    """The ids of `text`, the rendered messages, in which special tokens that lie in a message are
    spelled out.

    What stands between two special tokens of the template is encoded as a whole, as the tokenizer
    itself does; where none of a message's lies in it, its ids are left as they are.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            "a text holds the name of a special token, which only a tokenizer of tokenizer.json "
            "can spell out: take it out of the rows of task.*, or choose another model"
        )
    spans = _message_spans(tokenizer, messages, switches, text)
    encoding = _tokenize(tokenizer, text, return_offsets_mapping=True)
    ids: list[int] = []
    run: list[int] = []
    begin, foreign = 0, False

    def close(end: int) -> None:
        nonlocal run, foreign
        ids.extend(_spelled(tokenizer, text[begin:end], special) if foreign else run)
        run, foreign = [], False

    for index, (start, end) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        inside = any(start < last and first < end for first, last in spans)
        if index in special and not inside:
            close(start if start < end or not run else len(text))
            ids.append(index)
            begin = max(begin, end)
        else:
            foreign = foreign or index in special
            run.append(index)
    close(len(text))
    return ids


def _spelled(tokenizer: Any, text: str, special: frozenset[int]) -> list[int]:
    ids = encode_text(tokenizer, text)
    if special.isdisjoint(ids):
        return ids
    # A vocabulary of words may hold the name of a special token as a word: letter by letter then.
    ids = [index for letter in text for index in encode_text(tokenizer, letter)]
    if found := special.intersection(ids):
        name = tokenizer.convert_ids_to_tokens(min(found))
        raise UsageError(
            f"the tokenizer makes its special token {name!r} of ordinary text: take it out of the "
            "rows of task.* or choose another model"
        )
    return ids


def _message_spans(
    tokenizer: Any, messages: Sequence[Message], switches: Switches, text: str
) -> list[tuple[int, int]]:
    """Where the messages stand in `text`, their rendering: (first, last + 1) of each.

    They are found by rendering them once more between two marks, characters of Unicode's private
    area that `text` does not hold. The marks stand within a message's outer spaces, which templates
    like to strip.
    """
    if not tokenizer.chat_template:
        return [(0, len(text))]
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    first, last = next(free), next(free)
    marked = []
    for message in messages:
        content = message["content"]
        core = content.strip()
        before, _, after = content.partition(core) if core else (content, "", "")
        marked.append({**message, "content": f"{before}{first}{core}{last}{after}"})
    pieces = re.split(f"{first}([^{first}{last}]*){last}", _render(tokenizer, marked, switches))
    if "".join(pieces) != text:
        raise UsageError(
            "a text holds the name of a special token, and the model's chat template rewrites "
            "texts so that it could become that token: take it out of the rows of task.*, or "
            "choose another model"
        )
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]
