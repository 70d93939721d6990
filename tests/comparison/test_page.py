"""The documented tables are what the code says."""

from comparison_page import PAGE, page


def test_the_page_holds_the_tables_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python tests/comparison/comparison_page.py"
    assert text.count("| similarity |") + text.count("| distance |") == 15
