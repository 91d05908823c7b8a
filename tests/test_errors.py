from gracec.errors import first_line


def test_an_error_is_said_in_one_line_whatever_it_says() -> None:
    assert first_line(ValueError("\n no such size \nTraceback")) == "no such size "
    assert first_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"
