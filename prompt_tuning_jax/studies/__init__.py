"""Many runs in one command: suites of tasks and transfer between tasks."""
