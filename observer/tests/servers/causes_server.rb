# A server on Ruby's async that does the same as causes_server.py, with the same paths and responses.

require "async"
require "json"
require "resolv"
require "socket"
require "tempfile"

SIZE = 16 << 20
CHUNK = 64 << 10

LOCKED = Tempfile.new
LOCK = Mutex.new
RESOLVER = UDPSocket.new
RESOLVER.bind("127.0.0.1", 0)
LARGE = Tempfile.new
LARGE.write(Random.bytes(SIZE))
LARGE.fsync
HEAP = Array.new(200_000) { |number| [number] }

def now(clock = Process::CLOCK_MONOTONIC)
  Process.clock_gettime(clock)
end

# Makes another thread take something; returns once it has.
def hold(take, release, seconds)
  held = Queue.new
  Thread.new do
    take.call
    held << true
    sleep(seconds)
    release.call
  end
  held.pop
end

def cause_spin(seconds)
  finish = now(Process::CLOCK_THREAD_CPUTIME_ID) + seconds
  nil while now(Process::CLOCK_THREAD_CPUTIME_ID) < finish
end

def cause_hog(seconds)
  cause_spin(seconds)
end

def cause_sleep(seconds)
  sleep(seconds)
end

def cause_flock(_)
  File.open(LOCKED.path) { |file| file.flock(File::LOCK_EX) }
end

def cause_futex(_)
  LOCK.lock
  LOCK.unlock
end

def cause_file(seconds)
  finish = now + seconds
  chunk = String.new(capacity: CHUNK)
  while now < finish
    LARGE.advise(:dontneed)
    0.step(SIZE - 1, CHUNK) { |start| LARGE.pread(CHUNK, start, chunk) }
  end
end

def cause_dns(seconds)
  resolver = Resolv::DNS.new(nameserver_port: [["127.0.0.1", RESOLVER.addr[1]]], search: [], ndots: 1)
  resolver.timeouts = seconds
  resolver.getresources("test.invalid", Resolv::DNS::Resource::IN::A)
ensure
  resolver.close
end

def cause_gc(seconds)
  finish = now + seconds
  GC.start while now < finish
end

def prepare(cause, seconds)
  case cause
  when "flock"
    file = File.open(LOCKED.path)
    hold(-> { file.flock(File::LOCK_EX) }, -> { file.close }, seconds)
  when "futex"
    hold(-> { LOCK.lock }, -> { LOCK.unlock }, seconds)
  end
end

# Seconds that the main thread was in the run queue.
def delay
  File.read("/proc/self/schedstat").split[1].to_i / 1e9
end

def block(cause, seconds)
  prepare(cause, seconds)
  wall, cpu, before = now, now(Process::CLOCK_THREAD_CPUTIME_ID), delay
  send("cause_#{cause}", seconds) if respond_to?("cause_#{cause}", true)
  { wall: now - wall, cpu: now(Process::CLOCK_THREAD_CPUTIME_ID) - cpu, delay: delay - before }
end

def serve(client, reactor)
  _, cause, milliseconds = client.gets("\r\n\r\n").split(" ")[1].split("/")
  # The next request after this response must not be served in the same iteration of the loop.
  reactor.yield
  # In a non-blocking fiber, most of these would only yield to the loop.
  answer = Fiber.new(blocking: true) { block(cause, milliseconds.to_i / 1000.0) }.resume
  body = JSON.generate(answer)
  client.write("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: #{body.bytesize}\r\n\r\n#{body}")
  client.close
end

# Collect only on request.
GC.disable
Async::Reactor.run do |task|
  server = TCPServer.new("127.0.0.1", 0)
  $stdout.puts(server.addr[1])
  $stdout.flush
  loop do
    client = server.accept
    task.async { |task| serve(client, task.reactor) }
  end
end
