from hypothesis import given
from hypothesis import strategies as st

from tasks.releases.card import table


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_no_cell_breaks_out_of_its_table(rows: list[tuple[str, str]]) -> None:
    lines = table(("a", "b"), rows).split("\n")
    assert len(lines) == 2 + len(rows)
    for line in lines:
        assert line.replace("\\|", "").count("|") == 3
