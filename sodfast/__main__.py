from sodfast.cli import main

main()
