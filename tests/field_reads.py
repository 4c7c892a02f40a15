"""Which fields of the configuration a program reads, found from its source without running it.

A field counts as read by an attribute access whose base is known to be of the field's own section: a parameter or
variable annotated with the section's class, or a chain from one, such as `config.optim.learning_rate`. So equal names
in two sections are told apart, and a name that only looks like a field (`tensor.dtype`) does not count.

    unread = set(all_fields()) - fields_read([Path("train.py"), *Path("src").rglob("*.py")])
"""

import ast
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import schema

# A type is a class's name, ("each", T) for a collection of T, ("fixed", (T, ...)) for a tuple, or None: not known.
Type = Any
Field = tuple[str, str]

_COLLECTIONS = {"tuple", "list", "set", "frozenset", "Sequence", "Iterable", "Iterator", "Collection", "Generator"}
_MAPPINGS = {"dict", "Mapping", "defaultdict", "OrderedDict"}
_SAME_ITEMS = {"list", "tuple", "sorted", "reversed", "set", "iter", "chain", "islice"}


def all_fields() -> list[Field]:
    """Every field of the schema, as (class, field)."""
    return [(name, field.name) for name, kind in _sections().items() for field in dataclasses.fields(kind)]


def _sections() -> dict[str, type]:
    return {name: kind for name, kind in vars(schema).items() if dataclasses.is_dataclass(kind)}


def fields_read(files: Iterable[Path]) -> set[Field]:
    """The fields that the files read; classes and functions of one file are known in the others."""
    trees = [ast.parse(path.read_text("utf-8")) for path in files]
    program = _Program()
    for name in ("model_schema.py", "data_schema.py", "schema.py", "loader.py"):
        program.learn(ast.parse((Path(schema.__file__).parent / name).read_text("utf-8")))
    for tree in trees:
        program.learn(tree)
    for _ in range(3):  # what `self.x = ...` holds is known only after a pass, and may rest on another class's
        for tree in trees:
            program.run(tree.body, {}, None)
    return program.reads


class _Program:
    def __init__(self) -> None:
        self.sections = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in _sections().items()}
        self.attributes: dict[str, dict[str, Type]] = {}  # class -> attribute or property -> type
        self.returns: dict[str, Type] = {}  # function, or Class.method -> type
        self.reads: set[Field] = set()

    def learn(self, tree: ast.Module) -> None:
        """Note the classes first, then what their fields and functions are annotated with."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.attributes.setdefault(node.name, {})
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        self.attributes[node.name][item.target.id] = functools.partial(self.annotation, item.annotation)
                    elif isinstance(item, ast.FunctionDef):
                        returned = functools.partial(self.annotation, item.returns)
                        self.returns[f"{node.name}.{item.name}"] = returned
                        if any(ast.unparse(decorator).endswith("property") for decorator in item.decorator_list):
                            self.attributes[node.name][item.name] = returned
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.returns[node.name] = functools.partial(self.annotation, node.returns)

    def annotation(self, node: ast.expr | None) -> Type:
        """The type that an annotation names."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotation(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            return name if name in self.attributes else None
        if isinstance(node, ast.BinOp):
            return self.annotation(node.left) or self.annotation(node.right)
        if not isinstance(node, ast.Subscript):
            return None
        name = ast.unparse(node.value).rpartition(".")[2]
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name in _MAPPINGS:
            return ("each", self.annotation(inner[-1]))
        if name == "tuple" and len(inner) > 1 and not (isinstance(inner[1], ast.Constant) and inner[1].value is ...):
            return ("fixed", tuple(self.annotation(item) for item in inner))
        if name in _COLLECTIONS:
            return ("each", self.annotation(inner[0]))
        return self.annotation(inner[0]) if name in ("Optional", "Annotated", "Union") else None

    def run(self, body: Iterable[ast.stmt], env: dict[str, Type], owner: str | None) -> None:
        """Follow statements in order; `env` holds the names' types and `owner` is the class whose methods these are."""
        for node in body:
            if isinstance(node, ast.ClassDef):
                self.run(node.body, dict(env), node.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.function(node, env, owner)
            elif isinstance(node, ast.Assign):
                value = self.infer(node.value, env)
                for target in node.targets:
                    self.bind(target, value, env)
            elif isinstance(node, ast.AnnAssign):
                value = self.infer(node.value, env) if node.value else None
                self.bind(node.target, self.annotation(node.annotation) or value, env)
            elif isinstance(node, ast.For | ast.AsyncFor):
                self.bind(node.target, _item(self.infer(node.iter, env)), env)
                self.run([*node.body, *node.orelse], env, None)
            elif isinstance(node, ast.With | ast.AsyncWith):
                for item in node.items:
                    value = self.infer(item.context_expr, env)
                    if item.optional_vars is not None:
                        self.bind(item.optional_vars, _item(value) or value, env)
                self.run(node.body, env, None)
            else:
                self.parts(node, env)

    def parts(self, node: ast.AST, env: dict[str, Type]) -> None:
        """Follow everything inside a node that binds no name by itself."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self.run([child], env, None)
            elif isinstance(child, ast.expr):
                self.infer(child, env)
            else:
                self.parts(child, env)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, env: dict[str, Type], owner: str | None) -> None:
        inner = dict(env)
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            inner[argument.arg] = self.annotation(argument.annotation)
        if arguments.vararg:
            inner[arguments.vararg.arg] = ("each", self.annotation(arguments.vararg.annotation))
        if owner and arguments.args and arguments.args[0].arg == "self":
            inner["self"] = owner
        for default in [*arguments.defaults, *(item for item in arguments.kw_defaults if item)]:
            self.infer(default, env)
        self.run(node.body, inner, None)

    def bind(self, target: ast.expr, value: Type, env: dict[str, Type]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Attribute):
            base = self.infer(target.value, env)
            if isinstance(base, str) and base not in self.sections and value is not None:
                self.attributes[base].setdefault(target.attr, value)
        elif isinstance(target, ast.Tuple | ast.List):
            for index, part in enumerate(target.elts):
                fixed = isinstance(value, tuple) and value[0] == "fixed" and index < len(value[1])
                self.bind(part, value[1][index] if fixed else _item(value), env)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value, env)
        else:
            self.infer(target, env)

    def infer(self, node: ast.expr, env: dict[str, Type]) -> Type:
        """The type of an expression; every field that it reads is noted."""
        if isinstance(node, ast.Name):
            return env.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value, env)
            if not isinstance(base, str):
                return None
            if isinstance(node.ctx, ast.Load) and node.attr in self.sections.get(base, ()):
                self.reads.add((base, node.attr))
            found = self.attributes[base].get(node.attr)
            return found() if callable(found) else found
        if isinstance(node, ast.Call):
            return self.call(node, env)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            return self.comprehension(node, dict(env))
        if isinstance(node, ast.NamedExpr):
            value = self.infer(node.value, env)
            self.bind(node.target, value, env)
            return value
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            items = [self.infer(item, env) for item in node.elts]
            unpacked = [
                _item(kind) for item, kind in zip(node.elts, items, strict=True) if isinstance(item, ast.Starred)
            ]
            return ("each", unpacked[0]) if unpacked else ("fixed", tuple(items))
        if isinstance(node, ast.Subscript):
            base = self.infer(node.value, env)
            self.infer(node.slice, env)
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if isinstance(base, tuple) and base[0] == "fixed" and isinstance(index, int) and index < len(base[1]):
                return base[1][index]
            return base if isinstance(node.slice, ast.Slice) else _item(base)
        if isinstance(node, ast.Lambda):
            self.infer(node.body, env)
            return None
        kinds = [self.infer(child, env) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if isinstance(node, ast.IfExp | ast.BoolOp | ast.Starred | ast.Await) or (
            isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
        ):
            return next((kind for kind in kinds if kind is not None), None)
        return None

    def call(self, node: ast.Call, env: dict[str, Type]) -> Type:
        arguments = [self.infer(argument, env) for argument in node.args]
        for keyword in node.keywords:
            self.infer(keyword.value, env)
        name = ast.unparse(node.func).rpartition(".")[2]
        if isinstance(node.func, ast.Attribute):
            owner = node.func.value
            base = owner.id if isinstance(owner, ast.Name) and owner.id in self.attributes else self.infer(owner, env)
            if isinstance(base, str) and f"{base}.{name}" in self.returns:
                return self.returns[f"{base}.{name}"]()
            if isinstance(base, tuple) and name in ("values", "items"):
                return base if name == "values" else ("each", ("fixed", (None, _item(base))))
        if name in self.attributes:
            return name
        if name == "replace" or name in _SAME_ITEMS:
            return arguments[0] if arguments else None
        if name == "next":
            return _item(arguments[0])
        if name == "enumerate":
            return ("each", ("fixed", (None, _item(arguments[0]))))
        if name == "zip":
            return ("each", ("fixed", tuple(_item(kind) for kind in arguments)))
        found = self.returns.get(name) if isinstance(node.func, ast.Name) else None
        return found() if found else None

    def comprehension(self, node: Any, env: dict[str, Type]) -> Type:
        for generator in node.generators:
            self.bind(generator.target, _item(self.infer(generator.iter, env)), env)
            for condition in generator.ifs:
                self.infer(condition, env)
        if isinstance(node, ast.DictComp):
            self.infer(node.key, env)
            return ("each", self.infer(node.value, env))
        return ("each", self.infer(node.elt, env))


def _item(kind: Type) -> Type:
    """What a collection of this type holds."""
    if not isinstance(kind, tuple):
        return None
    return kind[1] if kind[0] == "each" else next((item for item in kind[1] if item is not None), None)
