"""A step's groups of keys: templates of the teacher, feedback, and what belongs together."""

import pytest
from configurations import lab, refusal


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}{demonstration}",
        "{prompt}{demonstration}{feedback}{answer}",
        "{prompt}{demonstration}{feedback}{}",
        "{prompt!r}{demonstration}{feedback}",
        "{prompt:d}{demonstration}{feedback}",
        "{prompt.id}{demonstration}{feedback}",
        "{prompt}{demonstration}{feedback}{",
    ],
)
def test_a_template_that_could_not_be_filled_is_refused(template: str) -> None:
    assert refusal(f"teacher.template='{template}'").startswith("teacher.template: ")


def test_templates_may_hold_literal_braces() -> None:
    config = lab("teacher.template='{prompt}{demonstration}{feedback} as {{json}}'")
    filled = config.teacher.template.format(prompt="a", demonstration="b", feedback="c")
    assert filled == "abc as {json}"
    assert refusal("teacher.demonstration_template=x").endswith(
        "must contain exactly the fields {demonstration} (got 'x')"
    )
    assert refusal("teacher.feedback_template='{demonstration}'").startswith(
        "teacher.feedback_template: "
    )


def test_feedback_is_read_as_release_0_1_0_wrote_it() -> None:
    assert lab("teacher.feedback=false") == lab() == lab("teacher.feedback=never")
    assert lab("teacher.feedback=true") == lab("teacher.feedback=always")
    assert lab().teacher.feedback == "never"
    for other in ("1", "'true'", "sometimes", "null"):
        assert refusal(f"teacher.feedback={other}").startswith("teacher.feedback: ")
