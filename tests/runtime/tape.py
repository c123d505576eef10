"""Recording what the kernels are called with and leave in memory, to repeat it
on another CPU by replay.cpp."""
import ctypes
import gc
import struct

import torch

from isvit_det.runtime.native import POINTER


def _memories():
    """All memory that a call may point to, (start, size)."""
    for found in gc.get_objects():
        # Not isinstance, which would wake lazy modules.
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            if found.layout is torch.strided and found.device.type == 'cpu':
                storage = found.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()
        elif issubclass(type(found), (ctypes.Array, ctypes.Structure)):
            yield ctypes.addressof(found), ctypes.sizeof(found)


def _numbers(*values):
    return struct.pack(f'<{len(values)}q', *values)


def _bytes_of(content):
    return _numbers(len(content)) + content


class Call:
    """One call: all memory that it reaches, in one piece, and its arguments.

    Args:
        name: of the function.
        args: as ctypes takes them.
    """

    def __init__(self, name, args):
        self.name = name
        # The widest first, where one lies in another.
        self._known = sorted(
            set(_memories()), key=lambda known: (known[0], -known[1]))
        self._places = {}  # of a memory by (start, size)
        self._size = 0
        self._pointers = {}  # from one place to another
        self._args = [self._keep_arg(arg) for arg in args]
        self._before = self._read()

    def finish(self):
        """Keep what the call has made of the memory."""
        self._after = self._read()

    def encode(self):
        """What replay.cpp reads of a call."""
        found = [
            _bytes_of(self.name.encode()),
            _bytes_of(self._before),
            _bytes_of(self._after),
            _numbers(len(self._pointers))
        ]
        found += [_numbers(*self._pointers), _numbers(len(self._args))]
        found += [_numbers(*arg) for arg in self._args]
        return b''.join(found)

    def _keep_arg(self, arg):
        """Whether an argument is a pointer, and its value or place."""
        # Of byref, which shows what it points to by this name only.
        arg = getattr(arg, '_obj', arg)
        if isinstance(arg, (ctypes.Structure, ctypes.Array)):
            place = self._keep(ctypes.addressof(arg))
            if isinstance(arg, ctypes.Structure):
                self._follow(arg, place)
            return 1, place
        if isinstance(arg, POINTER) and arg.value:
            return 1, self._keep(arg.value)
        return 0, arg.value or 0

    def _keep(self, address):
        """Place of an address, whose memory is kept."""
        start, size = next(known for known in self._known
                           if known[0] <= address < sum(known))
        if (start, size) not in self._places:
            # Alignments stay what they are.
            self._places[start, size] = self._size + start % 64
            self._size += -(-(size + start % 64) // 64) * 64
        return self._places[start, size] + address - start

    def _follow(self, structure, place):
        """Keep what a structure points to."""
        for name, kind in structure._fields_:
            at = place + getattr(type(structure), name).offset
            value = getattr(structure, name)
            if kind is POINTER and value:
                self._pointers[at] = self._keep(value)
            elif issubclass(kind, ctypes.Structure):
                self._follow(value, at)

    def _read(self):
        image = bytearray(self._size)
        for (start, size), place in self._places.items():
            image[place:place + size] = ctypes.string_at(start, size)
        for at, target in self._pointers.items():
            image[at:at + 8] = _numbers(target)
        return bytes(image)


class Recorder:
    """Stands for the library, and records what it is called with."""

    def __init__(self, library):
        self._library = library
        self.calls = []

    def __getattr__(self, name):
        function = getattr(self._library, name)

        def call(*args):
            if not args:
                return function()
            recorded = Call(name, args)
            function(*args)
            recorded.finish()
            self.calls.append(recorded)
            return None

        return call

    def encode(self):
        """The tape, as replay.cpp reads it."""
        return _numbers(len(self.calls)) + b''.join(call.encode()
                                                    for call in self.calls)
