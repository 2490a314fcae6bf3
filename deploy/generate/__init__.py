"""Makes the files of deploy/ and the package's copy of the custom resources; `make deploy`."""
