"""The two commands. rich and typer live only here; errors become exit codes."""
