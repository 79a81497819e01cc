import pytest


@pytest.fixture(scope="session")
def changed_operators(tmp_path_factory):
    """Makes a folder for PYTHONPATH that changes operators in every process, but for the reference.

    Each change, by the operator's name, is the body of a function of the arguments `given` and `named`, which may call
    `real` with them.
    """

    def make(**changes: str) -> str:
        folder = tmp_path_factory.mktemp("changed")
        lines = ["import time", "from crosspoint import ops"]
        for op, body in changes.items():
            lines += [
                f"def changed(*given, real=ops.{op}, **named):",
                "    if named.get('impl') == 'reference':",
                "        return real(*given, **named)",
                f"    {body}",
                f"ops.{op} = changed",
            ]
        (folder / "sitecustomize.py").write_text("\n".join(lines))
        return str(folder)

    return make
