from gracec.errors import GracecError, first_line


def test_an_error_is_said_in_one_line_whatever_it_says() -> None:
    assert first_line(ValueError("\n no such size \nTraceback")) == "no such size "
    assert first_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"


def test_an_error_is_one_printable_line_whatever_it_names() -> None:
    error = GracecError("no such key '\x1b[2J'", where="a\nb\ud800.json", fix="say größe")
    assert str(error) == r"a\nb\ud800.json: no such key '\x1b[2J'; say größe"
