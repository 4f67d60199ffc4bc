"""Pickle streams to inert values, by a machine that can call nothing.

`pickle` runs whatever a file names. This machine knows the binary opcodes that
Python's pickler writes in protocols 2 to 5 and imports nothing: a global must
stand in the caller's table, and there it is one of the caller's own functions
or no more than a name. The parsing of opcodes, with its length checks, is the
standard library's `pickletools.genops`, which never executes.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import mmap
import pickletools
from typing import Any
from typing import BinaryIO

# Globals that a stream may name. A function is called with what the stream
# gives it; None marks a name that is only ever handed on, such as a type.
Names = Mapping[str, Callable[..., Any] | None]

_PROTOCOLS = (b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05')
_OPERATIONS = 2**21  # a full-size released network takes about 2**16


@dataclasses.dataclass
class Budget:
  """What one file may cost; nested streams draw on the same."""

  bytes: int  # of memory beyond the file's own bytes
  operations: int = _OPERATIONS  # opcodes

  @classmethod
  def of(cls, size: int) -> 'Budget':
    """The budget of a file of `size` bytes: shared weights are few."""
    return cls(4 * size + 2**20)

  def spend(self, count: int) -> None:
    """Takes `count` bytes; raises ValueError once they are used up."""
    self.bytes -= count
    if self.bytes < 0:
      raise ValueError('its arrays unfold to several times the file itself')

  def step(self) -> None:
    """Takes one operation; raises ValueError once they are used up."""
    self.operations -= 1
    if self.operations < 0:
      raise ValueError(f'more than {_OPERATIONS} operations')


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
  """A name that stood in the table; never the thing itself."""

  name: str  # 'torch.FloatStorage'
  make: Callable[..., Any] | None


class Stateful:
  """A value that a stream may give a state after making it."""

  def build(self, state: Any) -> None:
    """Keeps the state."""
    raise NotImplementedError


def check_key(value: Any) -> Any:
  """Returns a dict's key or a set's member, which must be text or a number.

  Others could be made to hash alike, or to take for ever to hash.
  """
  if isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**48):
    return value
  raise ValueError(f'a key that is no text: {type(value).__name__}')


def quote(text: str) -> str:
  """A file's own words for an error's line: escaped, and not too many."""
  return repr(text[:60])


class Machine:
  """Runs one pickle of a stream.

  Attributes:
    stream: read from where it stands to just behind the pickle.
    names: the globals that it may name.
    budget: what it may cost.
    load: what a persistent id stands for; None refuses such ids.
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
    """Returns the value: None, numbers, text, bytes, containers, made values.

    Raises:
      ValueError: damaged, cut off, over budget, or it asks for what the table
        and the opcodes here do not offer.
    """
    protocol = self.stream.read(2)
    if protocol not in _PROTOCOLS:
      raise ValueError('no pickle of protocol 2 to 5')
    for opcode, argument, at in pickletools.genops(self.stream):
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
    if name in _VALUES:
      self._stack.append(argument)
    elif name in _CONSTANTS:
      self._stack.append(_CONSTANTS[name]())
    elif name in _METHODS:
      _METHODS[name](self, argument)
    else:
      raise ValueError('an operation that plain data does not need')

  def _stop(self, _: None) -> None:
    if self._marks:
      raise ValueError('an unfinished container')

  def _mark(self, _: None) -> None:
    self._marks.append(self._stack)
    self._stack = []

  def _since_mark(self) -> list[Any]:
    items = self._stack
    self._stack = self._marks.pop()
    return items

  def _pop(self, kind: type) -> Any:
    value = self._stack.pop()
    if not isinstance(value, kind):
      raise ValueError(
        f'a {type(value).__name__} where a {kind.__name__} belongs'
      )
    return value

  def _peek(self, kind: type) -> Any:
    value = self._pop(kind)
    self._stack.append(value)
    return value

  def _drop(self, _: None) -> None:
    self._stack.pop()

  def _drop_to_mark(self, _: None) -> None:
    self._since_mark()

  def _memoize(self, index: int | None) -> None:
    index = len(self._memo) if index is None else index
    self._memo[index] = self._stack[-1]

  def _recall(self, index: int) -> None:
    self._stack.append(self._memo[index])

  def _tuple(self, count: int) -> None:
    items = [self._stack.pop() for _ in range(count)]
    self._stack.append(tuple(reversed(items)))

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
    value, key = self._stack.pop(), self._stack.pop()
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

  def _name(self, name: str) -> None:
    if name not in self.names:
      raise ValueError(f'it names {quote(name)}, which plain weights do not')
    self._stack.append(Global(name, self.names[name]))

  def _global(self, argument: str) -> None:
    self._name('.'.join(argument.split(' ', 1)))  # genops joins by a space

  def _stack_global(self, _: None) -> None:
    name, module = self._pop(str), self._pop(str)
    self._name(f'{module}.{name}')

  def _make(self, _: None) -> None:
    arguments, made = self._pop(tuple), self._pop(Global)
    if made.make is None:
      raise ValueError(f'it calls {quote(made.name)}')
    self._stack.append(made.make(*arguments))

  def _build(self, _: None) -> None:
    state = self._stack.pop()
    if isinstance(self._stack[-1], dict):
      return  # attributes of an OrderedDict: a module table's versions
    self._peek(Stateful).build(state)

  def _persistent(self, _: None) -> None:
    if self.load is None:
      raise ValueError('it refers to data outside itself')
    self._stack.append(self.load(self._pop(tuple)))


# Whose argument is the value itself.
_VALUES = frozenset(
  (
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
    *('BINSTRING', 'SHORT_BINSTRING'),
    *('BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
  )
)
_CONSTANTS = {
  'NONE': lambda: None,
  'NEWTRUE': lambda: True,
  'NEWFALSE': lambda: False,
  'EMPTY_TUPLE': tuple,
  'EMPTY_LIST': list,
  'EMPTY_DICT': dict,
  'EMPTY_SET': set,
}
_METHODS = {
  'ADDITEMS': Machine._add_items,
  'APPEND': Machine._append,
  'APPENDS': Machine._appends,
  'BINGET': Machine._recall,
  'BINPERSID': Machine._persistent,
  'BINPUT': Machine._memoize,
  'BUILD': Machine._build,
  'FRAME': lambda machine, length: None,
  'FROZENSET': Machine._frozenset,
  'GLOBAL': Machine._global,
  'LONG_BINGET': Machine._recall,
  'LONG_BINPUT': Machine._memoize,
  'MARK': Machine._mark,
  'MEMOIZE': Machine._memoize,
  'NEWOBJ': Machine._make,
  'POP': Machine._drop,
  'POP_MARK': Machine._drop_to_mark,
  'REDUCE': Machine._make,
  'SETITEM': Machine._set_item,
  'SETITEMS': Machine._set_items,
  'STACK_GLOBAL': Machine._stack_global,
  'STOP': Machine._stop,
  'TUPLE': Machine._tuple_from_mark,
  'TUPLE1': lambda machine, _: machine._tuple(1),
  'TUPLE2': lambda machine, _: machine._tuple(2),
  'TUPLE3': lambda machine, _: machine._tuple(3),
}
