"""Does splitting help on this mixture? Methods × seeds from one base, sharing every common stage, in one table.

::

    figures.py   the typed result and its file
    check.py     methods that this mixture or machine cannot do
    compare.py   paired differences over seeds, at the end of training and at equal learning
    verdict.py   what they say, in sentences
    line.py      losses along θ0 + λ(θ̄ − θ0) of one model
    cost.py      steps, tokens, time and disk, before anything is trained
    stage.py     run_study: branches, merges, lines, evaluation

Importing the package loads nothing. Methods are named in :mod:`merit.recipe.methods`.
"""
