"""The run folder and the chain of stages in it; the only package that joins the others."""
