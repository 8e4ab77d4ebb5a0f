from megatron_apt.cli import main

if __name__ == "__main__":
    main()
