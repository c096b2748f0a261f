"""A hand-made producer of DLPack capsules: any device, any version, any mistake.

The structures are those of the standard (https://dmlc.github.io/dlpack/latest/), declared anew, so
that csrc/binding/dlpack.h is not judged by itself.
"""

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)

import numpy as np

CPU, CUDA = 1, 2


class Device(ctypes.Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


Deleter = CFUNCTYPE(None, c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", Deleter),
        ("flags", c_uint64),
        ("tensor", DLTensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]
is_valid = ctypes.pythonapi.PyCapsule_IsValid
is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]

CODES = {"float64": (2, 64), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}
CODES |= {
    "bool": (6, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint32": (1, 32),
    "complex64": (5, 64),
}


class Tensor:
    """A view of a NumPy array, which it keeps. Counts exports and calls of the deleter."""

    def __init__(
        self,
        array,
        versioned=True,
        device=(CPU, 0),
        version=(1, 0),
        byte_offset=0,
        strides=True,
        read_only=False,
        deleter=True,
        name=None,
        code=None,
        change=None,
    ):
        self.array, self.versioned, self.device, self.version = array, versioned, device, version
        self.byte_offset, self.with_strides, self.read_only = byte_offset, strides, read_only
        self.with_deleter, self.name, self.code, self.change = deleter, name, code, change
        self.exported = self.deleted = 0
        self.capsules = []  # (structure, deleter) of each export
        self.asked = []  # keywords of each export

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.asked.append({"stream": stream, "max_version": max_version})
        self.exported += 1
        array = self.array
        self.shape = (c_int64 * max(array.ndim, 1))(*array.shape)
        self.strides = (c_int64 * max(array.ndim, 1))(*(s // array.itemsize for s in array.strides))
        tensor = DLTensor(
            array.ctypes.data - self.byte_offset,
            Device(*self.device),
            array.ndim,
            DataType(*(self.code or CODES[array.dtype.name]), 1),
            self.shape,
            self.strides if self.with_strides else None,
            self.byte_offset,
        )
        if self.change:
            self.change(tensor)
        deleter = Deleter(self._deleted) if self.with_deleter else Deleter()
        if self.versioned:
            managed = Versioned(*self.version, None, deleter, int(self.read_only), tensor)
            name = b"dltensor_versioned"
        else:
            managed, name = Managed(tensor, None, deleter), b"dltensor"
        self.capsules.append((managed, deleter))
        return new_capsule(ctypes.addressof(managed), self.name or name, None)

    def _deleted(self, managed):
        self.deleted += 1

    def forget(self):
        self.exported = self.deleted = 0
        self.capsules.clear()
        self.asked.clear()


class Answers:
    """An object whose __dlpack__ returns, or raises, what it is told to."""

    def __init__(self, answer, device=(CPU, 0)):
        self.answer, self.device = answer, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **keywords):
        if callable(self.answer):
            raise self.answer()
        return self.answer


def ones(*shape, dtype=np.float32, **keywords):
    return Tensor(np.ones(shape, dtype), **keywords)
