import os

import pytest

# On a GPU, before cuBLAS starts: without it torch refuses products where it is told to be deterministic, which is how
# the battery poisons fresh memory.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from op_tester import DTYPES, OpTester, compiled_backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the battery by what the operator under test lists and by the backends that are usable here."""
    tester = metafunc.cls
    if tester is None or not issubclass(tester, OpTester):
        return
    backends = compiled_backends(tester.op)
    values = {
        "backend": (backends, ["-".join(pair) for pair in backends]),
        "dtype": (DTYPES, [str(dtype).removeprefix("torch.") for dtype in DTYPES]),
        "case": (list(tester.cases()), None),
        "bad_call": (list(tester.bad_calls()), None),
        "operator_call": (list(tester.operator_calls()), None),
        "dynamic": ([False, True], ["static", "dynamic"]),
    }
    for name, (arguments, ids) in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, arguments, ids=ids)


if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton 3.6 converts arrays of one element to integers in a way that numpy 2.4 refuses (triton#9171).
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_for_numpy

    # It replaces the language's functions at every call from one jitted function of another, which takes most of the
    # time; once a launch does.
    patch_language = interpreter._patch_lang
    replaced = set()

    def patch_language_once(fn):
        modules = {id(v) for v in fn.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core}
        if modules <= replaced:
            return interpreter._LangPatchScope()
        scope = patch_language(fn)
        replaced.update(modules)
        restore = scope.restore

        def restore_all():
            restore()
            replaced.clear()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_language_once
