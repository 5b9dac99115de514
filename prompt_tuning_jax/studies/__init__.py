"""Studies of several runs each: suites of tasks, and transfer between tasks."""
