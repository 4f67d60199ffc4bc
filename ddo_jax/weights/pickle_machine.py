"""Reads pickle streams into inert values; nothing that a file names is run.

Python's `pickle` runs whatever a file names. This machine knows the binary
opcodes that the pickler writes in protocols 2 to 5, and imports nothing. A
global must stand in the caller's table, where it is either one of the caller's
own functions or no more than a name. The standard library's
`pickletools.genops`, which never executes anything, parses the opcodes and
checks their lengths.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import mmap
import pickletools
from typing import Any
from typing import BinaryIO

from ddo_jax.weights import files

# The globals that a stream may name. A function is called with the arguments
# that the stream gives it; None marks a name that is only passed on, such as
# that of a type.
Names = Mapping[str, Callable[..., Any] | None]

_PROTOCOLS = (b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05')
_OPERATIONS = 2**20  # a full-size released network takes about 2**16


@dataclasses.dataclass
class Budget:
  """What one file may cost; the streams nested in it share one budget."""

  bytes: int  # of memory beyond the file's own bytes
  operations: int = _OPERATIONS  # opcodes

  @classmethod
  def of(cls, size: int) -> 'Budget':
    """Returns the budget of a file of `size` bytes.

    Arrays may take several times the file's size, since a file stores the
    numbers that several tensors share only once; but such tensors are few.
    """
    return cls(4 * size + 2**20)

  def spend(self, count: int) -> None:
    """Takes `count` bytes; raises ValueError once none are left."""
    self.bytes -= count
    if self.bytes < 0:
      raise ValueError('its arrays unfold to several times the file itself')

  def step(self) -> None:
    """Takes one operation; raises ValueError once none are left."""
    self.operations -= 1
    if self.operations < 0:
      raise ValueError(f'more than {_OPERATIONS} operations')


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
  """A global that a stream named: its name, never the thing itself."""

  name: str  # 'torch.FloatStorage'
  make: Callable[..., Any] | None


class Stateful:
  """A value that a stream may give a state after it is made."""

  def build(self, state: Any) -> None:
    """Keeps the state."""
    raise NotImplementedError


def check_key(value: Any) -> Any:
  """Returns a dict's key or a set's member; it must be text or a number.

  Other values could be made to hash alike, or to take for ever to hash.
  """
  if isinstance(value, str):
    if len(value) > files.MAX_KEY:
      raise ValueError(f'a key of {len(value)} characters')
    return value
  if isinstance(value, int) and abs(value) < 2**48:
    return value
  raise ValueError(f'a key that is no text: {type(value).__name__}')


def quote(text: str) -> str:
  """Returns a file's own words as an error may show them: escaped and short."""
  return repr(text[:60])


class Machine:
  """Runs one pickle of a stream.

  Attributes:
    stream: the stream; it is read from where it stands to the pickle's end.
    names: the globals that the pickle may name.
    budget: what the pickle may cost.
    load: returns what a persistent id stands for; None refuses such ids.
  """

  def __init__(
    self,
    stream: BinaryIO | mmap.mmap,
    names: Names,
    budget: Budget,
    load: Callable[[Any], Any] | None = None,
  ):
    self.stream = stream
    self.names = names
    self.budget = budget
    self.load = load
    self._stack = []
    self._marks = []
    self._memo = {}

  def run(self) -> Any:
    """Runs the pickle and returns its value.

    The value is made of None, numbers, text, bytes, containers, `Global`s and
    what the functions of the table return.

    Raises:
      ValueError: the pickle is damaged, cut off or over budget, or asks for
        what neither the table nor the opcodes here offer.
    """
    protocol = self.stream.read(2)
    if protocol not in _PROTOCOLS:
      raise ValueError('no pickle of protocol 2 to 5')
    for opcode, argument, at in pickletools.genops(self.stream):  # type: ignore[arg-type]
      self.budget.step()
      try:
        self._step(opcode.name, argument)
      except (LookupError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else 'malformed'
        raise ValueError(f'{reason} ({opcode.name}, byte {at})') from error
    if len(self._stack) != 1:
      raise ValueError(f'a pickle of {len(self._stack)} values, not one')
    return self._stack[0]

  def _step(self, name: str, argument: Any) -> None:
    """Performs one operation."""
    if name in _VALUES:
      self._stack.append(argument)
    elif name in _CONSTANTS:
      self._stack.append(_CONSTANTS[name]())
    elif name in _METHODS:
      _METHODS[name](self, argument)
    else:
      raise ValueError('an operation that plain data does not need')

  def _ignore(self, _: Any) -> None:
    """Passes over what only helps a reader: the length of a frame."""

  def _stop(self, _: None) -> None:
    if self._marks:
      raise ValueError('an unfinished container')

  def _mark(self, _: None) -> None:
    self._marks.append(self._stack)
    self._stack = []

  def _since_mark(self) -> list[Any]:
    """Pops all values since the last mark, and the mark."""
    items = self._stack
    self._stack = self._marks.pop()
    return items

  def _pop(self, kind: type) -> Any:
    """Pops a value, which must be of a kind."""
    value = self._stack.pop()
    if not isinstance(value, kind):
      raise ValueError(
        f'a {type(value).__name__} where a {kind.__name__} belongs'
      )
    return value

  def _peek(self, kind: type) -> Any:
    """Returns the value on top, which must be of a kind, and leaves it."""
    value = self._pop(kind)
    self._stack.append(value)
    return value

  def _drop(self, _: None) -> None:
    self._stack.pop()

  def _drop_to_mark(self, _: None) -> None:
    self._since_mark()

  def _memoize(self, index: int | None) -> None:
    if index is None:
      index = len(self._memo)
    self._memo[index] = self._stack[-1]

  def _recall(self, index: int) -> None:
    self._stack.append(self._memo[index])

  def _tuple(self, count: int) -> None:
    items = [self._stack.pop() for _ in range(count)]
    self._stack.append(tuple(reversed(items)))

  def _tuple_of_1(self, _: None) -> None:
    self._tuple(1)

  def _tuple_of_2(self, _: None) -> None:
    self._tuple(2)

  def _tuple_of_3(self, _: None) -> None:
    self._tuple(3)

  def _tuple_from_mark(self, _: None) -> None:
    items = tuple(self._since_mark())
    self._stack.append(items)

  def _append(self, _: None) -> None:
    value = self._stack.pop()
    self._peek(list).append(value)

  def _appends(self, _: None) -> None:
    items = self._since_mark()
    self._peek(list).extend(items)

  def _set_item(self, _: None) -> None:
    value = self._stack.pop()
    key = self._stack.pop()
    self._peek(dict)[check_key(key)] = value

  def _set_items(self, _: None) -> None:
    items = self._since_mark()
    target = self._peek(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
      target[check_key(key)] = value

  def _add_items(self, _: None) -> None:
    items = self._since_mark()
    self._peek(set).update(map(check_key, items))

  def _frozenset(self, _: None) -> None:
    items = frozenset(map(check_key, self._since_mark()))
    self._stack.append(items)

  def _push_global(self, name: str) -> None:
    """Pushes a global that stands in the table, and refuses any other."""
    if name not in self.names:
      raise ValueError(f'it names {quote(name)}, which plain weights do not')
    self._stack.append(Global(name, self.names[name]))

  def _global(self, argument: str) -> None:
    # `genops` gives 'module name', joined by a space.
    self._push_global(argument.replace(' ', '.', 1))

  def _stack_global(self, _: None) -> None:
    name = self._pop(str)
    module = self._pop(str)
    self._push_global(f'{module}.{name}')

  def _call(self, _: None) -> None:
    """Calls the caller's function that stands for a global, and no other."""
    arguments = self._pop(tuple)
    called = self._pop(Global)
    if called.make is None:
      raise ValueError(f'it calls {quote(called.name)}')
    self._stack.append(called.make(*arguments))

  def _build(self, _: None) -> None:
    state = self._stack.pop()
    if isinstance(self._stack[-1], dict):
      return  # the attributes of an OrderedDict, which hold versions only
    self._peek(Stateful).build(state)

  def _persistent(self, _: None) -> None:
    if self.load is None:
      raise ValueError('it refers to data outside itself')
    self._stack.append(self.load(self._pop(tuple)))


def _none() -> None:
  return None


def _true() -> bool:
  return True


def _false() -> bool:
  return False


# Opcodes whose argument is the value itself.
_VALUES = frozenset(
  [
    'BINBYTES',
    'BINBYTES8',
    'BINFLOAT',
    'BININT',
    'BININT1',
    'BININT2',
    'BINSTRING',
    'BINUNICODE',
    'BINUNICODE8',
    'BYTEARRAY8',
    'LONG1',
    'LONG4',
    'SHORT_BINBYTES',
    'SHORT_BINSTRING',
    'SHORT_BINUNICODE',
  ]
)
# Opcodes that push a constant or an empty container, made anew each time.
_CONSTANTS: dict[str, Callable[[], Any]] = {
  'NONE': _none,
  'NEWTRUE': _true,
  'NEWFALSE': _false,
  'EMPTY_TUPLE': tuple,
  'EMPTY_LIST': list,
  'EMPTY_DICT': dict,
  'EMPTY_SET': set,
}
# The other opcodes that plain data needs.
_METHODS: dict[str, Callable[[Machine, Any], None]] = {
  'ADDITEMS': Machine._add_items,
  'APPEND': Machine._append,
  'APPENDS': Machine._appends,
  'BINGET': Machine._recall,
  'BINPERSID': Machine._persistent,
  'BINPUT': Machine._memoize,
  'BUILD': Machine._build,
  'FRAME': Machine._ignore,
  'FROZENSET': Machine._frozenset,
  'GLOBAL': Machine._global,
  'LONG_BINGET': Machine._recall,
  'LONG_BINPUT': Machine._memoize,
  'MARK': Machine._mark,
  'MEMOIZE': Machine._memoize,
  'NEWOBJ': Machine._call,
  'POP': Machine._drop,
  'POP_MARK': Machine._drop_to_mark,
  'REDUCE': Machine._call,
  'SETITEM': Machine._set_item,
  'SETITEMS': Machine._set_items,
  'STACK_GLOBAL': Machine._stack_global,
  'STOP': Machine._stop,
  'TUPLE': Machine._tuple_from_mark,
  'TUPLE1': Machine._tuple_of_1,
  'TUPLE2': Machine._tuple_of_2,
  'TUPLE3': Machine._tuple_of_3,
}
