"""The conflict engine: one mean gradient per dataset at the base, compressed, compared, and judged.

``sketch``, ``geometry`` and ``reliability`` are pure maths, ``gradients`` runs the model, ``store`` keeps files, and
``measure`` is the stage that joins them. Importing this package imports none of them: geometry needs NumPy alone, the
others torch.
"""
