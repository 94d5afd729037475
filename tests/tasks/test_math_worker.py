"""What math_worker.py does by itself, before math-verify is asked."""

import pytest

from sodfast.tasks.math_worker import as_latex, last_boxed


@pytest.mark.parametrize(
    ("response", "box"),
    [
        (r"so \boxed{1}.", r"\boxed{1}"),
        (r"\boxed{1} no, \boxed{2}", r"\boxed{2}"),
        (r"\boxed{\frac{1}{2}} done}", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{\boxed{1}}", r"\boxed{1}"),
        (r"\boxed{1} and \boxed{2", r"\boxed{1}"),  # cut at the cap
        (r"\boxed{", None),
        (r"\boxed 3", None),
        ("3", None),
        ("", None),
    ],
)
def test_the_last_box_that_is_closed(response: str, box: str | None) -> None:
    assert last_boxed(response) == box


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        ("42", "$42$"),
        (" -0.50", "$-0.50$"),
        ("1e5", "$100000$"),  # as LaTeX it would be 1 · e · 5
        ("2.5E-3", "$0.0025$"),
        ("nan", "$nan$"),
        (r"\frac{1}{2}", r"$\frac{1}{2}$"),
        (r"$x^2$", r"$x^2$"),
        (r"\boxed{3}", r"\boxed{3}"),
    ],
)
def test_an_answer_as_math_verify_reads_it(answer: str, latex: str) -> None:
    assert as_latex(answer) == latex
