//! Where the fields of kernel structures are on the running kernel, as byte offsets.
//! Found by the loader in BTF and tracefs, injected as one global before the programs are verified, so
//! that the verifier sees constants; read only by the eBPF side's `kernel.rs`.

/// Declares [`KernelLayout`] together with the list the loader fills it from, so that neither can lack a field.
macro_rules! kernel_layout {
    ($($(#[doc = $doc:literal])* $field:ident = $root:literal . $path:literal;)*) => {
        /// Byte offsets into kernel structures, one field for each that a program reads.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct KernelLayout {
            $($(#[doc = $doc])* #[doc = concat!("`", $root, ".", $path, "`, in bytes.")] pub $field: u32,)*
            /// 1 where `sched_switch` passes the previous state as an argument (5.18 and newer), else 0.
            pub switch_has_state: u32,
            /// The descriptor argument in the record of `sys_enter_accept*`, in bytes.
            pub enter_accept_fd: u32,
            /// The return value in the record of every `sys_exit_*`, in bytes.
            pub exit_ret: u32,
        }

        impl KernelLayout {
            /// Nothing known: what the programs are built with.
            pub const ZERO: Self =
                Self { $($field: 0,)* switch_has_state: 0, enter_accept_fd: 0, exit_ret: 0 };

            /// Offsets that come from BTF: structure, member path (alternatives, newest first, split by `|`), and where to put it.
            pub const MEMBERS: &[(&str, &str, fn(&mut Self) -> &mut u32)] =
                &[$(($root, $path, |layout| &mut layout.$field),)*];
        }
    };
}

kernel_layout! {
    task_pid = "task_struct"."pid";
    task_tgid = "task_struct"."tgid";
    /// Renamed in 5.14.
    task_state = "task_struct"."__state|state";
    task_files = "task_struct"."files";
    task_signal = "task_struct"."signal";
    signal_live = "signal_struct"."live.counter";
    files_fdt = "files_struct"."fdt";
    fdt_max_fds = "fdtable"."max_fds";
    fdt_fd = "fdtable"."fd";
    file_private_data = "file"."private_data";
    file_inode = "file"."f_inode";
    inode_number = "inode"."i_ino";
    socket_file = "socket"."file";
    socket_sk = "socket"."sk";
    sock_family = "sock"."__sk_common.skc_family";
    sock_port = "sock"."__sk_common.skc_num";
    sock_net = "sock"."__sk_common.skc_net.net";
    sock_protocol = "sock"."sk_protocol";
    sock_ack_backlog = "sock"."sk_ack_backlog";
    sock_max_ack_backlog = "sock"."sk_max_ack_backlog";
    net_inum = "net"."ns.inum";
}

const WORDS: usize = KernelLayout::MEMBERS.len() + 3;
crate::shared!(KernelLayout, 4 * WORDS);
