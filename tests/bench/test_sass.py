"""The reader of machine code finds the loops over memory, and which source they come from."""

import sass

SOURCE = """\
def helper(x):
    return x + 1


def sweep(x):
    for _ in range(3):
        x = helper(x)
    return x
"""
LISTING = """
.L_x_0:
        //## File "{path}", line 6
        /*0010*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
.L_x_1:
        //## File "{path}", line 2
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @P0  LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FADD R4, R4, R8 ;
        //## File "{path}", line 7
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/              @P2  BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   FADD R4, R4, R8 ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_3:
        //## File "{path}", line 1
        /*00a0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/                   NOP ;
        /*00c0*/              @P0  BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_4:
"""


def test_the_innermost_loops_that_touch_memory_are_found(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    wide, narrow = sass.read_listing(LISTING.format(path=path))
    assert (wide.instructions, wide.bytes, wide.wide) == (5, 16 + 8 + 16, True)
    assert wide.functions == {"helper", "sweep"}
    # NOPs are not issued, forward branches make no loop.
    assert (narrow.instructions, narrow.bytes, narrow.wide) == (2, 4, False)
    assert narrow.functions == {"helper"}


def test_a_kernel_without_such_a_loop_counts_as_a_whole(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    straight = LISTING.format(path=path).replace("BRA `(.L_x_0)", "EXIT").replace("(.L_x_1)", "()")
    straight = straight.replace("(.L_x_3)", "()")
    (whole,) = sass.read_listing(straight)
    assert (whole.instructions, whole.bytes) == (12, 16 + 8 + 16 + 4)
    assert whole.functions == {"helper", "sweep"}


def test_a_line_belongs_to_the_innermost_function(tmp_path):
    path = tmp_path / "nested.py"
    path.write_text("def outer():\n    def inner():\n        pass\n    return inner\n\n\nX = 1\n")
    assert [sass.function_at(str(path), line) for line in (1, 3, 4, 7)] == [
        "outer",
        "inner",
        "outer",
        None,
    ]
    assert sass.function_at(str(tmp_path / "absent.py"), 1) is None
