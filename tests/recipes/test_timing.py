import timing


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    ticks = iter(range(100))
    contenders = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = timing.take_turns(contenders, 3, lambda: float(next(ticks)), least=1.0)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_summary() -> None:
    assert timing.summary([2.0, 1.0, 1.23456], 3) == {"median": 1.235, "spread": 0.81}
