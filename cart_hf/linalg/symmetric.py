"""Gram matrices and their top eigenpairs by BLAS and LAPACK, without Python's global lock.

scipy.linalg.eigh computes the same but holds the lock, so two worker threads would take turns. scipy publishes its BLAS
and LAPACK as C function pointers (scipy.linalg.cython_blas, cython_lapack); a ctypes call through them releases it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

# Imported here and not on first use: a limit on BLAS threads reaches only the libraries that are loaded by then.
import scipy.linalg.cython_blas as blas
import scipy.linalg.cython_lapack as lapack

Matrix = npt.NDArray[np.float64]


class LapackError(ArithmeticError):
    """A LAPACK routine reported failure or returned fewer eigenpairs than asked for."""


@cache
def _routine(name: str) -> Callable[..., None]:
    capsule = (blas if name in blas.__pyx_capi__ else lapack).__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(capsule, get_name(capsule))
    # Fortran passes everything by reference: untyped pointers, void result.
    return ctypes.CFUNCTYPE(None)(address)


def _call(name: str, *arguments: Any) -> None:
    """Call a routine, passing every argument by reference as Fortran does."""
    pointers: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            pointers.append(ctypes.c_void_p(argument.ctypes.data))
        else:
            pointers.append(ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.byref(argument))
    _routine(name)(*pointers)


def _call_lapack(name: str, *arguments: Any) -> None:
    """Call a routine whose last argument is INFO, which is added here and checked."""
    info = ctypes.c_int(0)
    _call(name, *arguments, info)
    if info.value != 0:
        raise LapackError(f"LAPACK {name} failed (info {info.value})")


def gram(matrix: Matrix) -> Matrix:
    """Return the lower triangle of ``matrix^T matrix`` (BLAS dsyrk: half the work of a product); the rest is zero.

    :param matrix: shape (m, n), float64, C-contiguous.
    :return: shape (n, n), in Fortran's order.
    """
    m, n = map(ctypes.c_int, matrix.shape)
    result: Matrix = np.zeros((n.value, n.value), order="F")
    # row-major (m, n) is column-major (n, m): A A^T of that is what we want
    _call("dsyrk", b"L", b"N", n, m, ctypes.c_double(1), matrix, n, ctypes.c_double(0), result, n)
    return result


class Tridiagonal:
    """A symmetric matrix reduced to tridiagonal form ``Q T Q^T`` (LAPACK dsytrd).

    :param matrix: shape (n, n), float64, in Fortran's order, of which the lower triangle is read; overwritten.
    """

    def __init__(self, matrix: Matrix) -> None:
        n = len(matrix)
        self._n = ctypes.c_int(n)
        self._reflectors = matrix
        self._diagonal, self._off = np.empty(n), np.empty(max(n - 1, 1))
        self._tau = np.empty(max(n - 1, 1))
        work = np.empty(max(1, 64 * n))
        _call_lapack(
            "dsytrd", b"L", self._n, matrix, self._n, self._diagonal, self._off, self._tau, work,
            ctypes.c_int(len(work)),
        )  # fmt: skip

    def eigenvalues(self) -> npt.NDArray[np.float64]:
        """Return all n eigenvalues, ascending (dsterf)."""
        values: npt.NDArray[np.float64] = self._diagonal.copy()
        off = self._off.copy()
        _call_lapack("dsterf", self._n, values, off)
        return values

    def top_eigenpairs(self, k: int) -> tuple[npt.NDArray[np.float64], Matrix]:
        """Return the k largest eigenvalues, ascending, and their eigenvectors as rows, shape (k, n) (dstemr, dormtr).

        :raises LapackError: when a routine fails or finds fewer than k.
        """
        n = self._n.value
        diagonal, off = self._diagonal.copy(), np.append(self._off[: n - 1], 0.0)
        values = np.empty(n)
        rows: Matrix = np.empty((k, n))  # rows in C order are columns in Fortran order
        found, try_rac = ctypes.c_int(0), ctypes.c_int(1)
        support = np.empty(2 * max(1, k), dtype=np.intc)
        work, integers = np.empty(max(1, 18 * n)), np.empty(max(1, 10 * n), dtype=np.intc)
        _call_lapack(
            "dstemr", b"V", b"I", self._n, diagonal, off, ctypes.c_double(0), ctypes.c_double(0),
            ctypes.c_int(n - k + 1), self._n, found, values, rows, self._n, ctypes.c_int(k),
            support, try_rac, work, ctypes.c_int(len(work)), integers,
            ctypes.c_int(len(integers)),
        )  # fmt: skip
        if found.value != k:
            raise LapackError(f"LAPACK dstemr found {found.value} of {k} eigenpairs")
        work = np.empty(max(1, 64 * max(n, k)))
        _call_lapack(
            "dormtr", b"L", b"L", b"N", self._n, ctypes.c_int(k), self._reflectors, self._n, self._tau, rows,
            self._n, work, ctypes.c_int(len(work)),
        )  # fmt: skip
        return values[:k], rows
