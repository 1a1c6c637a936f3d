# SPDX-License-Identifier: Apache-2.0
"""Kernels that stop in the middle of a row and go on later, made from the source of those that do not.

What a loop over steps carries on is its variables and the work array. A stopping kernel writes all of them to ``state``
where it stops, and reads them from there when it resumes, so that it computes the same numbers as in one go, Newton's
Jacobian and the step control included.
"""

import ast

from pyro_latentde.solve.fused.lower import variable_types

__all__ = ["resumable_adjoint", "resumable_forward"]


def resumable_forward(source: str, carried: int) -> tuple[str, int]:
    """``forward`` of one row, with the further arguments ``state``, ``resume`` and ``stop``.

    It stops before the next step when ``stop`` of them are accepted; what it records begins at the start of ``buf``.

    Args:
        source: All functions of the kernel.
        carried: Entries of the work array that steps carry on.

    Returns:
        The source, and the size of ``state``.
    """
    module, kernel, rows = _opened(source, "forward", "state: Floats, resume: int, stop: int")
    at = next(i for i, s in enumerate(rows.body) if isinstance(s, ast.While) and {"code", "last"} <= _names(s.test))
    names, tail = _assigned(rows.body[:at]), rows.body[at + 1 :]
    save, load = _exchange(source, "forward", names, carried)
    rows.body[at].body[:0] = _code(f"if accepted == stop:\n    stopped = True\n{_indented(save)}\n    break")
    before = _code(f"if resume != 0:\n{_indented(load)}\n    pos = 0\nstopped = False")
    after = ast.If(ast.Name("stopped"), _code("spans[2 * r + 1] = pos"), tail)
    rows.body = [*rows.body[:at], *before, rows.body[at], after]
    return _written(module), len(names) + carried


def resumable_adjoint(source: str, carried: int) -> tuple[str, int]:
    """``adjoint`` of one row, with the further arguments ``state``, ``resume``, ``more`` and ``low``.

    It goes from the last record down to ``low``; ``more``: earlier ones follow in another call.

    Args:
        source: All functions of the kernel.
        carried: Entries of the work array that steps carry on.

    Returns:
        The source, and the size of ``state``.
    """
    module, kernel, rows = _opened(source, "adjoint", "state: Floats, resume: int, more: int, low: int")
    outer = next(i for i, s in enumerate(rows.body) if isinstance(s, ast.If) and "status" in _names(s.test))
    solved = rows.body[outer].body
    at = next(i for i, s in enumerate(solved) if isinstance(s, ast.For) and s.target.id == "n")
    names = _assigned([*rows.body[:outer], *solved[:at]])
    save, load = _exchange(source, "adjoint", names, carried)
    loop, done = solved[at], ast.If(ast.parse("more == 0", mode="eval").body, solved[at + 1 :] or [ast.Pass()], [])
    loop.iter.args[1] = ast.parse("low - 1", mode="eval").body
    first = _code(f"if resume != 0:\n{_indented(load)}\nbegin = 0\nif more != 0:\n    begin = -1")
    rows.body[outer].body = [*solved[:at], *first, loop, *_code(f"if more != 0:\n{_indented(save)}"), done]
    rows.body[outer + 1 :] = [ast.If(done.test, rows.body[outer + 1 :], [])]
    return _written(module), len(names) + carried


def _opened(source: str, name: str, arguments: str) -> tuple[ast.Module, ast.FunctionDef, ast.For]:
    """The source, the kernel in it with more arguments, and its loop over rows."""
    module = ast.parse(source)
    kernel = next(f for f in module.body if f.name == name)
    kernel.args.args += ast.parse(f"def f({arguments}): pass").body[0].args.args
    return module, kernel, next(s for s in kernel.body if isinstance(s, ast.For))


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _assigned(statements: list[ast.stmt]) -> list[str]:
    """Variables that have a value after these statements."""
    found = {
        node.id: None
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return list(found)


def _exchange(source: str, kernel: str, names: list[str], carried: int) -> tuple[str, str]:
    """Source that writes variables and work array to ``state``, and that which reads them."""
    types = variable_types(source, kernel)
    read = {"float": "state[{}]", "int": "int(state[{}])", "bool": "state[{}] != 0.0"}
    save = [f"state[{k}] = {name}" for k, name in enumerate(names)]
    load = [f"{name} = {read[types[name]].format(k)}" for k, name in enumerate(names)]
    loop, at = f"for i in range({carried}):", len(names)
    save.append(f"{loop}\n    state[{at} + i] = w[i]")
    load.append(f"{loop}\n    w[i] = state[{at} + i]")
    return "\n".join(save), "\n".join(load)


def _code(text: str) -> list[ast.stmt]:
    return ast.parse(text).body


def _indented(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")


def _written(module: ast.Module) -> str:
    return ast.unparse(ast.fix_missing_locations(module))
