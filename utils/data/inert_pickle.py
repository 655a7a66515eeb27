"""Reads a pickle as data: what it would call is described and never called, so that nothing in a file can be executed."""

import pickletools
from typing import Any, BinaryIO, Dict, List, NamedTuple, Tuple, Union

MOST_OPERATIONS = 2_000_000  # CIFAR-100's training file has about 300,000
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
            "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
            "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
FUNCTIONS = {"numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct",
             "numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer", "_codecs encode"}


class Function(NamedTuple):
    """A function or class that the pickle names, "module name"."""

    name: str


class Call:
    """A call that the pickle asks for: a function's name, its arguments, and the state to give to what it returns."""

    def __init__(self, function: str, arguments: Tuple[Any, ...]):
        self.function, self.arguments, self.state = function, arguments, None


def read_inert(contents: bytes) -> Any:
    """What a pickle holds, of any protocol, as dictionaries with str keys, lists, tuples, numbers, strings, Function and Call.

    Strings of Python 2 become str, a character per byte. Memory and time are bounded by the file's size: nothing is allocated
    for what is not there. Raises ValueError where the pickle holds more than a record of numbers, strings and numpy arrays, and
    that or another exception where it is damaged.
    """
    return Machine().run(contents)


class Machine:
    """pickle's stack machine, with the few operations that plain data needs. Subclasses may know more functions and keys."""

    functions = FUNCTIONS

    def __init__(self):
        self.stack: List[Any] = []
        self.marks: List[int] = []
        self.memo: Dict[int, Any] = {}

    def run(self, contents: Union[bytes, BinaryIO]) -> Any:
        """What the pickle holds; the exceptions are those of `read_inert`. An open file is read to the pickle's end."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(contents)):
            if count > MOST_OPERATIONS:
                raise ValueError("it has too many parts")
            self.step(operation.name, argument)
        return self.stack[-1]

    def step(self, operation: str, argument: Any) -> None:
        push = self.stack.append
        match operation:
            case "PROTO" | "FRAME" | "STOP": pass
            case _ if operation in LITERALS: push(argument)
            case _ if operation in CONSTANTS: push(CONSTANTS[operation])
            case _ if operation in EMPTY: push(EMPTY[operation]())
            case "MARK": self.marks.append(len(self.stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3": push(tuple(self.last(int(operation[-1]))))
            case "TUPLE": push(tuple(self.since_mark()))
            case "LIST": push(self.since_mark())
            case "APPEND": self.extend(self.last(1))
            case "APPENDS": self.extend(self.since_mark())
            case "DICT": push(self.record(self.since_mark()))
            case "SETITEM": self.update(self.last(2))
            case "SETITEMS": self.update(self.since_mark())
            case "GLOBAL": push(self.function(argument))
            case "STACK_GLOBAL": push(self.function("{} {}".format(*self.last(2))))
            case "REDUCE": push(self.call(*self.last(2)))
            case "BINPERSID": push(self.persistent(*self.last(1)))
            case "BUILD": self.build(*self.last(1))
            case "PUT" | "BINPUT" | "LONG_BINPUT": self.memo[argument] = self.stack[-1]
            case "MEMOIZE": self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET": push(self.memo[argument])
            case _: raise ValueError(f"it holds more than data: the operation {operation}")

    def last(self, count: int) -> List[Any]:
        """Take the last `count` values off the stack."""
        if count > len(self.stack):
            raise ValueError("it takes more values than it gives")
        return self.cut(len(self.stack) - count)

    def since_mark(self) -> List[Any]:
        return self.cut(self.marks.pop())

    def cut(self, start: int) -> List[Any]:
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, values: List[Any]) -> None:
        expect(self.stack[-1], list).extend(values)

    def update(self, items: List[Any]) -> None:
        expect(self.stack[-1], dict).update(self.record(items))

    def record(self, items: List[Any]) -> Dict[Any, Any]:
        return dict(zip(map(self.key, items[::2]), items[1::2], strict=True))

    def key(self, value: Any) -> Any:
        """Keys are text or bytes; anything else could nest too deeply to be hashed."""
        return value.decode("latin1") if type(value) is bytes else expect(value, str)

    def function(self, name: str) -> Function:
        if name not in self.functions:
            raise ValueError(f"it holds more than data: it names {name[:80]!r}")
        return Function(name)

    def call(self, function: Any, arguments: Any) -> Any:
        return Call(expect(function, Function).name, expect(arguments, tuple))

    def persistent(self, identity: Any) -> Any:
        """What stands outside the pickle."""
        raise ValueError("it holds more than data: the operation BINPERSID")

    def build(self, state: Any) -> None:
        expect(self.stack[-1], Call).state = state


def expect(value: Any, kind: type) -> Any:
    """`value`, which must be of this very type; raises ValueError."""
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} is meant")
    return value
