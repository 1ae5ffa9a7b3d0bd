//! Byte offsets of fields of kernel structures on the running kernel. The loader finds them in BTF and tracefs and
//! writes them into a global before the programs are verified, so that the verifier sees constants. Only `kernel/` of
//! the eBPF side reads them.

/// Offset of a member that the running kernel does not have.
pub const ABSENT: u32 = u32::MAX;

/// A structure, the path of a member in it, and the field of [`KernelLayout`] that takes the offset.
pub type Member = (&'static str, &'static str, fn(&mut KernelLayout) -> &mut u32);

/// Declares [`KernelLayout`] together with the list that the loader fills it from, so that neither can miss a field.
macro_rules! kernel_layout {
    (
        required { $($(#[doc = $doc:literal])* $field:ident = $root:literal . $path:literal;)* }
        optional { $($(#[doc = $opt_doc:literal])* $opt:ident = $opt_root:literal . $opt_path:literal;)* }
    ) => {
        /// Byte offsets into kernel structures: one field for each member that a program reads.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct KernelLayout {
            $($(#[doc = $doc])* #[doc = concat!("`", $root, ".", $path, "`, in bytes.")] pub $field: u32,)*
            $($(#[doc = $opt_doc])* #[doc = concat!("`", $opt_root, ".", $opt_path, "`, in bytes; [`ABSENT`] where the kernel has none.")] pub $opt: u32,)*
            /// A [`RingShape`](crate::ring::RingShape): the argument lists of the `io_uring` tracepoints.
            pub ring_shape: u32,
            /// 1 if `sched_switch` passes the previous state as an argument (5.18 and newer), otherwise 0.
            pub switch_has_state: u32,
            /// Offset of the first argument in the record of every `sys_enter_*`, in bytes; each argument takes eight.
            pub enter_arguments: u32,
            /// Offset of the return value in the record of every `sys_exit_*`, in bytes.
            pub exit_ret: u32,
        }

        impl KernelLayout {
            /// Initial value in the built programs, before the loader fills it in.
            pub const ZERO: Self =
                Self { $($field: 0,)* $($opt: ABSENT,)* ring_shape: 0, switch_has_state: 0, enter_arguments: 0, exit_ret: 0 };

            /// Members to look up in BTF: structure, member path (alternatives separated by `|`, newest first), and
            /// destination.
            pub const MEMBERS: &[Member] = &[$(($root, $path, |layout| &mut layout.$field),)*];

            /// Members that not every kernel has, in the same form.
            pub const OPTIONAL: &[Member] = &[$(($opt_root, $opt_path, |layout| &mut layout.$opt),)*];
        }
    };
}

kernel_layout! {
    required {
        task_pid = "task_struct"."pid";
        task_tgid = "task_struct"."tgid";
        /// Renamed in 5.14.
        task_state = "task_struct"."__state|state";
        task_stack = "task_struct"."stack";
        task_files = "task_struct"."files";
        task_signal = "task_struct"."signal";
        signal_live = "signal_struct"."live.counter";
        files_fdt = "files_struct"."fdt";
        fdt_max_fds = "fdtable"."max_fds";
        fdt_fd = "fdtable"."fd";
        file_private_data = "file"."private_data";
        file_inode = "file"."f_inode";
        inode_number = "inode"."i_ino";
        inode_mode = "inode"."i_mode";
        socket_file = "socket"."file";
        socket_sk = "socket"."sk";
        sock_family = "sock"."__sk_common.skc_family";
        sock_port = "sock"."__sk_common.skc_num";
        sock_net = "sock"."__sk_common.skc_net.net";
        sock_protocol = "sock"."sk_protocol";
        sock_state = "sock"."__sk_common.skc_state";
        sock_address4 = "sock"."__sk_common.skc_rcv_saddr";
        sock_address6 = "sock"."__sk_common.skc_v6_rcv_saddr";
        sock_type = "sock"."sk_type";
        sock_drops = "sock"."sk_drops.counter";
        sock_received = "sock"."sk_receive_queue.qlen";
        /// Accept queue of a unix listener: one buffer for each connection that waits.
        sock_received_first = "sock"."sk_receive_queue.next";
        buffer_sk = "sk_buff"."sk";
        sock_socket = "sock"."sk_socket";
        sock_ack_backlog = "sock"."sk_ack_backlog";
        sock_max_ack_backlog = "sock"."sk_max_ack_backlog";
        net_inum = "net"."ns.inum";
        /// Requests whose handshake is in progress.
        accept_half_open = "inet_connection_sock"."icsk_accept_queue.qlen.counter";
        /// First of the requests whose handshake is complete: the one that has waited longest.
        accept_head = "inet_connection_sock"."icsk_accept_queue.rskq_accept_head";
        /// `TCP_DEFER_ACCEPT`, in retransmissions; 0 if it is off.
        accept_defer = "inet_connection_sock"."icsk_accept_queue.rskq_defer_accept";
        request_next = "request_sock"."dl_next";
        request_sk = "request_sock"."sk";
        unix_address = "unix_sock"."addr";
        unix_peer = "unix_sock"."peer";
        address_length = "unix_address"."len";
        address_name = "unix_address"."name";
        iter_file = "bpf_iter__task_file"."file";
        iter_fd = "bpf_iter__task_file"."fd";
        iter_task = "bpf_iter__task_file"."task";
    }
    optional {
        /// Number of the system call that a thread is in; negative outside of any.
        registers_call = "pt_regs"."orig_ax|syscallno";
        registers_first = "pt_regs"."di|orig_x0";
        registers_second = "pt_regs"."si";
        registers_third = "pt_regs"."dx";
        registers_frame = "pt_regs"."bp";
        ring_file = "io_kiocb"."file";
        ring_opcode = "io_kiocb"."opcode";
        ring_flags = "io_kiocb"."flags";
        ring_context = "io_kiocb"."ctx";
        ring_user_data = "io_kiocb"."cqe.user_data|user_data";
        /// The descriptor, until the kernel looks up the file; older kernels look it up first.
        ring_fd = "io_kiocb"."cqe.fd";
        /// Of an accept: slot in the table of direct descriptors that the connection is to take; 0 for none.
        ring_slot = "io_accept"."file_slot";
        completion_user_data = "io_uring_cqe"."user_data";
        completion_result = "io_uring_cqe"."res";
        completion_flags = "io_uring_cqe"."flags";
        /// Base address of a thread's local storage, on x86-64.
        task_thread_pointer = "task_struct"."thread.fsbase";
        /// First TCP connection or TCP listener of a Multipath TCP socket.
        multipath_first = "mptcp_sock"."first";
        /// Data of the protocol on top of TCP, for Multipath TCP its `mptcp_subflow_context`.
        sock_upper = "inet_connection_sock"."icsk_ulp_data";
        /// The Multipath TCP socket that a TCP connection belongs to.
        subflow_parent = "mptcp_subflow_context"."conn";
    }
}

const WORDS: usize = KernelLayout::MEMBERS.len() + KernelLayout::OPTIONAL.len() + 4;
crate::shared::shared!(KernelLayout, 4 * WORDS);
