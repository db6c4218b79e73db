import numpy as np


def gradient_basis(references_MxN, rank, rank_tol=1e-6):
    """Orthonormal columns [N, K] that span the references; K is at most `rank`."""
    norms_M = np.linalg.norm(references_MxN, axis=1)
    units_MxN = references_MxN[norms_M > 0] / norms_M[norms_M > 0, None]
    values_M, vectors_MxM = np.linalg.eigh(units_MxN @ units_MxN.T)  # smallest first
    keep_M = values_M > rank_tol * values_M.max(initial=0.0)
    keep_M[:-rank] = False
    return units_MxN.T @ vectors_MxM[:, keep_M] / np.sqrt(values_M[keep_M])


def input_basis(inputs_CxI, rank, energy, rank_tol=1e-6):
    """Orthonormal columns [I, R] that span the share `energy` of the inputs' second moment."""
    values_I, vectors_IxI = np.linalg.eigh(inputs_CxI.T @ inputs_CxI)
    above_I = values_I.sum() - np.cumsum(values_I)  # the larger eigenvalues
    keep_I = (above_I < energy * values_I.sum()) & (values_I > rank_tol * values_I.max())
    keep_I[:-rank] = False
    return vectors_IxI[:, keep_I]


def project(gradient, basis):
    """A gradient [N], or that of a matrix [I, O], without its component in the basis."""
    return gradient - basis @ (basis.T @ gradient)
