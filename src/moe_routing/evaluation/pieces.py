"""Cells, and fitted nulls, budgets and scales as pieces of work for the store; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.config.cells import (
    SAMPLE,
    Cell,
    budget_files,
    budget_path,
    budget_settings,
    cell_files,
    cell_settings,
    intervention_files,
    null_path,
    null_settings,
    scale_files,
    scale_path,
    scale_settings,
)
from moe_routing.evaluation.store import (
    CELL_SUFFIXES,
    FITTED_SUFFIXES,
    NULL_SUFFIXES,
    Piece,
    as_settings,
)

if TYPE_CHECKING:
    from moe_routing.config.study import StudyConfig


def cell_piece(study: StudyConfig, cell: Cell) -> Piece:
    """Return a cell as a piece of work."""
    settings = as_settings(cell_settings(study, cell))
    return Piece(cell.path, CELL_SUFFIXES, settings, tuple(cell_files(study, cell)))


def null_piece(study: StudyConfig, null: str) -> Piece:
    """Return a fitted null and its table of diagnostics as a piece of work."""
    settings = as_settings(null_settings(study, null))
    return Piece(null_path(null), NULL_SUFFIXES, settings, (SAMPLE, *intervention_files([null])))


def scale_piece(study: StudyConfig, strategy: str) -> Piece:
    """Return the fitted scale of a strategy as a piece of work."""
    settings, files = as_settings(scale_settings(study, strategy)), scale_files(study, strategy)
    return Piece(scale_path(strategy), FITTED_SUFFIXES, settings, tuple(files))


def budget_piece(study: StudyConfig, strategy: str) -> Piece:
    """Return the fitted budget of a strategy as a piece of work."""
    settings, files = as_settings(budget_settings(study, strategy)), budget_files(study, strategy)
    return Piece(budget_path(strategy), FITTED_SUFFIXES, settings, tuple(files))


def fitted_pieces(study: StudyConfig) -> dict[str, Piece]:
    """Return every fitted budget and scale of a study, by its file."""
    pieces = [
        *(budget_piece(study, name) for name in study.budgeted),
        *(scale_piece(study, name) for name in study.scaled),
    ]
    return {f"{piece.path}.json": piece for piece in pieces}
