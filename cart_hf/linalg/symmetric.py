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

Matrix = npt.NDArray[np.float32] | npt.NDArray[np.float64]


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


def _precision(matrix: Matrix) -> tuple[str, Callable[[float], Any]]:
    """Return the letter that starts the routines' names, and how to pass a number."""
    return ("s", ctypes.c_float) if matrix.dtype == np.float32 else ("d", ctypes.c_double)


def gram(matrix: Matrix) -> Matrix:
    """Return the lower triangle of ``matrix^T matrix`` (BLAS syrk: half the work of a product); the rest is zero.

    :param matrix: shape (m, n), float32 or float64, contiguous in C's order or in Fortran's (a transposed matrix).
    :return: shape (n, n), of the same type, in Fortran's order.
    """
    letter, number = _precision(matrix)
    m, n = map(ctypes.c_int, matrix.shape)
    result: Matrix = np.zeros((n.value, n.value), order="F", dtype=matrix.dtype)
    # to Fortran, a row-major (m, n) is a column-major (n, m): the product with its transpose on the right
    transposed, leading = (b"N", n) if matrix.flags.c_contiguous else (b"T", m)
    _call(f"{letter}syrk", b"L", transposed, n, m, number(1), matrix, leading, number(0), result, n)
    return result


class Tridiagonal:
    """A symmetric matrix reduced to tridiagonal form ``Q T Q^T`` (LAPACK sytrd).

    :param matrix: shape (n, n), float32 or float64, in Fortran's order, of which the lower triangle is read;
        overwritten.
    """

    def __init__(self, matrix: Matrix) -> None:
        n = len(matrix)
        self._letter, self._number = _precision(matrix)
        self._n = ctypes.c_int(n)
        self._reflectors = matrix
        self._diagonal, self._off, self._tau = (self._empty(max(size, 1)) for size in (n, n - 1, n - 1))
        work = self._empty(64 * n)
        _call_lapack(
            f"{self._letter}sytrd", b"L", self._n, matrix, self._n, self._diagonal, self._off, self._tau, work,
            ctypes.c_int(len(work)),
        )  # fmt: skip

    def _empty(self, *shape: int) -> Matrix:
        empty: Matrix = np.empty(shape, dtype=self._reflectors.dtype)
        return empty

    def eigenvalues(self) -> Matrix:
        """Return all n eigenvalues, ascending (sterf)."""
        values: Matrix = self._diagonal.copy()
        off = self._off.copy()
        _call_lapack(f"{self._letter}sterf", self._n, values, off)
        return values

    def top_eigenpairs(self, k: int) -> tuple[Matrix, Matrix]:
        """Return the k largest eigenvalues, ascending, and their eigenvectors as rows, shape (k, n) (stemr, ormtr).

        :raises LapackError: when a routine fails or finds fewer than k.
        """
        n = self._n.value
        diagonal, off = self._diagonal.copy(), self._empty(n)
        off[: n - 1], off[n - 1] = self._off[: n - 1], 0.0
        values, rows = self._empty(n), self._empty(k, n)  # rows in C order are columns in Fortran order
        found, try_rac = ctypes.c_int(0), ctypes.c_int(1)
        support = np.empty(2 * max(1, k), dtype=np.intc)
        work, integers = self._empty(18 * n), np.empty(10 * n, dtype=np.intc)
        _call_lapack(
            f"{self._letter}stemr", b"V", b"I", self._n, diagonal, off, self._number(0), self._number(0),
            ctypes.c_int(n - k + 1), self._n, found, values, rows, self._n, ctypes.c_int(k),
            support, try_rac, work, ctypes.c_int(len(work)), integers,
            ctypes.c_int(len(integers)),
        )  # fmt: skip
        if found.value != k:
            raise LapackError(f"LAPACK {self._letter}stemr found {found.value} of {k} eigenpairs")
        work = self._empty(64 * max(n, k))
        _call_lapack(
            f"{self._letter}ormtr", b"L", b"L", b"N", self._n, ctypes.c_int(k), self._reflectors, self._n, self._tau,
            rows, self._n, work, ctypes.c_int(len(work)),
        )  # fmt: skip
        return values[:k], rows
