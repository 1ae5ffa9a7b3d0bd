# A loop of select that collects garbage on request, like gc_loop.py; counts and times are Ruby's own.
# The large heap makes a collection take longer than a call.
BALLAST = Array.new(100_000) { |n| [n] }
GC.start
GC.disable
sources = [$stdin, IO.pipe[0]]
$stdout.sync = true
before = [GC.count, GC.total_time]

loop do
  IO.select(sources)
  command = $stdin.gets or break
  command.split[1].to_i.times do
    GC.start
    IO.select(sources, nil, nil, 0.005)
  end
  count, time = GC.count - before[0], GC.total_time - before[1]
  puts %({"count": #{count}, "seconds": #{time / 1e9}})
end
